"""Products that stand in two fusions though one would do, as a TPU's compiler writes them."""

import pytest

from gptlab.train.hlo import Program
from gptlab.train.repeated import repeated_flops

SCORES = 2 * 8 * 4 * 16  # FLOPs
PROGRAM = """
HloModule twice
%largest (p0: f32[8,16], p1: f32[16,4]) -> f32[8,4] {
  %p0 = f32[8,16]{1,0} parameter(0)
  %p1 = f32[16,4]{1,0} parameter(1)
  ROOT %dot.1 = f32[8,4]{1,0} dot(%p0, %p1), DIMS, metadata={op_name="scores"}
}
%masked (q0: f32[8,16], q1: f32[16,4], q2: pred[8,4], q3: f32[16,4]) -> f32[8,4] {
  %q0 = f32[8,16]{1,0} parameter(0)
  %q1 = f32[16,4]{1,0} parameter(1)
  %q2 = pred[8,4]{1,0} parameter(2)
  %q3 = f32[16,4]{1,0} parameter(3)
  %dot.2 = f32[8,4]{1,0} dot(%q0, %q1), DIMS, metadata={op_name="SECOND"}
  ROOT %s = f32[8,4]{1,0} select(%q2, %dot.2, %dot.2)
}
%within (a: f32[8,16], b: f32[16,4], other: f32[16,4], m: pred[8,4]) -> f32[8,4] {
  %a = f32[8,16]{1,0} parameter(0)
  %b = f32[16,4]{1,0} parameter(1)
  %other = f32[16,4]{1,0} parameter(2)
  %m = pred[8,4]{1,0} parameter(3)
  %same = f32[16,4]{1,0} copy(%b)
  %f.1 = f32[8,4]{1,0} fusion(%a, %b), kind=kOutput, calls=%largest
  %f.2 = f32[8,4]{1,0} fusion(%a, %READ, %m, %b), kind=kOutput, calls=%masked
  ROOT %sum = f32[8,4]{1,0} add(%f.1, %f.2)
}
ENTRY %main (x: f32[8,16], y: f32[16,4], z: f32[16,4], w: pred[8,4]) -> f32[8,4] {
  %x = f32[8,16]{1,0} parameter(0)
  %y = f32[16,4]{1,0} parameter(1)
  %z = f32[16,4]{1,0} parameter(2)
  %w = pred[8,4]{1,0} parameter(3)
  ROOT %g = f32[8,4]{1,0} fusion(%x, %y, %z, %w), kind=kLoop, calls=%within
}
""".replace("DIMS", "lhs_contracting_dims={1}, rhs_contracting_dims={0}")


@pytest.mark.parametrize(
    ("second", "read", "repeated"),
    [
        ("scores", "b", SCORES),  # the mask is read beside
        ("scores", "same", SCORES),
        ("scores", "other", 0),  # the next piece of a product that is cut, or another gradient
        ("values", "b", 0),
    ],
)
def test_what_is_computed_again_from_the_same_is_a_repetition(second, read, repeated):
    program = Program(PROGRAM.replace("SECOND", second).replace("READ", read))
    assert program.flops == 2 * SCORES
    assert repeated_flops(program) == repeated
