"""Tests of BLEU against its formula, and of what it is computed of."""

import sys

import numpy as np
import pytest

from maestro.data import DataError
from maestro.data.bleu import bleu


@pytest.fixture(autouse=True)
def needs_sacrebleu(request):
  if "without" not in request.node.name:
    pytest.importorskip("sacrebleu", reason="pip install '.[text]'")


def test_bleu_is_the_formula():
  # Precisions 4/5, 3/4, 2/3, 1/2, whose product is 1/5; 5 tokens against 6.
  expected = 100 * np.exp(1 - 6 / 5) * 0.2**0.25
  assert bleu(["a b c d e"], ["a b c d f g"]) == pytest.approx(expected)


def test_bleu_counts_over_the_corpus():
  hypotheses = ["a b c d e", "g h i j"]
  references = ["a b c d f g", "g h i j"]
  # 8/9, 6/7, 4/5, 2/3; 9 tokens against 10.
  precision = 8 / 9 * 6 / 7 * 4 / 5 * 2 / 3
  expected = 100 * np.exp(1 - 10 / 9) * precision**0.25
  assert bleu(hypotheses, references) == pytest.approx(expected)
  assert bleu(references, references) == pytest.approx(100)


def test_bleu_is_of_detokenized_text_and_case_counts_if_asked():
  reference = ["A man's dog runs, quickly."]
  assert bleu(["a man's dog runs, quickly."], reference) == pytest.approx(100)
  assert bleu(["a man's dog runs, quickly."], reference, lowercase=False) < 100
  # sacreBLEU's own tokens: a space before a point makes no difference.
  assert bleu(["A man's dog runs , quickly ."], reference) == pytest.approx(100)


def test_the_signature_is_the_one_that_is_said():
  import sacrebleu

  metric = sacrebleu.metrics.BLEU(lowercase=True)
  metric.corpus_score(["a b c d"], [["a b c d"]])
  signature = str(metric.get_signature())
  said = "nrefs:1|case:lc|eff:no|tok:13a|smooth:exp"
  assert signature.startswith(said) and said in bleu.__doc__


@pytest.mark.parametrize("references", [[], ["a"], ["a", "b", "c"]])
def test_one_reference_a_hypothesis(references):
  with pytest.raises(DataError, match=f"2 hypotheses, {len(references)} ref"):
    bleu(["a", "b"], references)
  with pytest.raises(DataError, match="0 hypotheses, 0 references"):
    bleu([], [])


def test_without_the_package_it_is_named(monkeypatch):
  monkeypatch.setitem(sys.modules, "sacrebleu", None)
  with pytest.raises(DataError, match=r"'sacrebleu': pip install .*\[text\]"):
    bleu(["a"], ["a"])
