"""BLEU of translations, by sacreBLEU, so that numbers can be compared."""

from __future__ import annotations

from collections.abc import Sequence

from maestro.data.dataset import DataError
from maestro.data.text import require


def bleu(
  hypotheses: Sequence[str],
  references: Sequence[str],
  *,
  lowercase: bool = True,
) -> float:
  """Returns the BLEU of a corpus (Papineni et al., 2002), in [0, 100].

  It is sacreBLEU's (Post, 2018) of detokenized text, by its own tokens, with
  the signature nrefs:1|case:lc|eff:no|tok:13a|smooth:exp.

  Args:
    hypotheses: translations, as `Vocabulary.decode` gives them.
    references: what was translated, as `Split.references` has them: as they
      were written, and not through a vocabulary.
    lowercase: whether case does not count ("lc"); "mixed" otherwise.

  Raises:
    DataError: If there are none, or not one reference for each hypothesis, or
      the package `sacrebleu` is not installed.
  """
  if not hypotheses or len(hypotheses) != len(references):
    raise DataError(
      f"BLEU needs one reference for each hypothesis: {len(hypotheses)}"
      f" hypotheses, {len(references)} references"
    )
  metric = require("sacrebleu", "BLEU").metrics.BLEU(lowercase=lowercase)
  return float(metric.corpus_score(hypotheses, [references]).score)
