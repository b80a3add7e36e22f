"""What is read from compiled programs: snippets of HLO as XLA writes it."""

import pytest

from maestro.parallel.programs import (
  Collective,
  Memory,
  collectives,
  exchanged,
  fingerprint,
  shortage,
)


@pytest.mark.parametrize(
  ("line", "found"),
  [
    ("%a = f32[8,2]{1,0} all-reduce(%b), channel_id=1", [("f32", (8, 2), 64)]),
    (
      "%a = (bf16[8]{0:T(8)(2,1)}, /*index=1*/pred[]) all-reduce-start(%b, %c)",
      [("bf16", (8,), 16), ("pred", (), 1)],
    ),
    (
      "%a = (f32[2]{0}, f32[8]{0:S(1)}) all-gather-start(%b), channel_id=2",
      [("f32", (8,), 32)],
    ),
    ("%a = f32[8]{0} all-gather-done(%b)", []),
    (
      "%a = (s4[3]{0}, s4[3]{0}, u32[], u32[]) collective-permute-start(%b)",
      [("s4", (3,), 2)],
    ),
    ("ROOT %a = f8e4m3fn[5]{0} reduce-scatter(%b)", [("f8e4m3fn", (5,), 5)]),
    ("%all-reduce.1 = f32[8]{0} fusion(%b), calls=%all-reduce.2", []),
  ],
)
def test_a_collective_is_what_devices_get(line, found):
  read = collectives(f"  {line}\n")
  assert [(c.dtype, c.shape, c.bytes) for c in read] == found


def test_a_collective_in_several_parts_counts_once():
  line = "  %a = f32[8]{0} all-gather(%b), channel_id=3, dimensions={0}\n"
  other = line.replace("channel_id=3", "channel_id=4")
  reduced = line.replace("all-gather", "all-reduce")
  read = collectives(line + other + reduced + line)
  assert exchanged(read) == {
    "all-gather": {"count": 2, "bytes": 64},
    "all-reduce": {"count": 1, "bytes": 32},
  }
  assert read[0] == Collective("all-gather", "f32", (8,))


HLO = """HloModule jit_f, is_scheduled=true

FileNames
1 "/a/b.py"

StackFrames
1 {file_location_id=1 parent_frame_id=1}


ENTRY %main (p: f32[8]) -> f32[8] {
  ROOT %a = f32[8]{0} negate(%p), metadata={op_name="neg" stack_frame_id=1}
}
"""


def test_a_fingerprint_is_of_the_program_and_not_of_its_source():
  moved = HLO.replace("/a/b.py", "/c.py").replace("stack_frame_id=1", "")
  assert fingerprint(moved) == fingerprint(HLO)
  assert fingerprint(HLO.replace("negate", "sine")) != fingerprint(HLO)


def test_memory_is_all_that_is_held_at_once():
  memory = Memory(arguments=10, outputs=7, aliased=6, temporaries=5, code=2)
  assert memory.peak == 10 + 1 + 5 + 2


def test_a_compiler_that_lacks_memory_says_how_much():
  told = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used"
  assert shortage(RuntimeError(f"{told} 20.5G of 15.75G hbm.\nmore")) == (
    int(20.5 * 2**30),
    f"{told} 20.5G of 15.75G hbm.",
  )
  told = "RESOURCE_EXHAUSTED: the total memory required (64.12G) exceeds it"
  assert shortage(RuntimeError(told)) == (int(64.12 * 2**30), told)
  assert shortage(RuntimeError("RESOURCE_EXHAUSTED: no"))[0] is None
  assert shortage(RuntimeError("INTERNAL: (64.12G)")) is None
