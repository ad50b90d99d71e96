"""Products, loops and collectives read from HLO, of programs whose work is known by arithmetic."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from gptlab.train import hlo
from gptlab.train.hlo import Program, convolution_flops


def program_of(function, *shapes, **options):
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return Program(jax.jit(function, **options).lower(*args).compile().as_text())


def test_products_count_two_flops_a_multiply_add():
    assert program_of(jnp.matmul, (8, 16), (16, 4)).flops == 2 * 8 * 16 * 4
    batched = program_of(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), (3, 8, 16), (3, 16, 4))
    assert batched.flops == 3 * 2 * 8 * 16 * 4
    assert program_of(lambda a: jnp.tanh(a) + 1, (8, 16)).flops == 0


def test_loops_count_every_trip():
    def scanned(x, w):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0]

    once = 2 * 8 * 16 * 16
    assert program_of(scanned, (8, 16), (7, 16, 16)).flops == 7 * once

    def nested(x, w):
        return jax.lax.fori_loop(2, 5, lambda _, x: scanned(x, w), x)

    assert program_of(nested, (8, 16), (7, 16, 16)).flops == 3 * 7 * once


def test_a_loop_that_may_end_early_counts_in_full():
    def search(x, w):
        unfinished = lambda c: (c[0] < 9) & ~(c[1] > 1e6).all()  # noqa: E731
        return jax.lax.while_loop(unfinished, lambda c: (c[0] + 2, c[1] @ w), (jnp.int32(1), x))[1]

    assert program_of(search, (8, 16), (16, 16)).flops == 4 * 2 * 8 * 16 * 16  # 1, 3, 5, 7


def test_a_loop_advances_by_what_its_result_says():
    """The counter plus one, which comes first, is used and is not the next counter."""

    def pairs(x, w):
        def body(carry):
            i, x = carry
            x = x @ jax.lax.dynamic_index_in_dim(w, i + 1, keepdims=False)
            return i + 2, x @ jax.lax.dynamic_index_in_dim(w, i, keepdims=False)

        return jax.lax.while_loop(lambda carry: carry[0] < 8, body, (jnp.int32(0), x))[1]

    compiled = jax.jit(pairs).lower(
        jax.ShapeDtypeStruct((8, 16), jnp.float32), jax.ShapeDtypeStruct((8, 16, 16), jnp.float32)
    )
    text = re.sub(r'"known_trip_count":\{[^}]*\},?', "", compiled.compile().as_text())
    assert "known_trip_count" not in text
    assert Program(text).flops == 8 * 2 * 8 * 16 * 16


def test_gradients_have_two_products_more():
    def loss(x, w):
        return jnp.sum(jnp.tanh(x @ w))

    step = program_of(jax.grad(loss, argnums=(0, 1)), (8, 16), (16, 4))
    assert step.flops == 3 * 2 * 8 * 16 * 4


# ruff: noqa: E501 (HLO as libtpu 0.0.42.1 prints it, shortened)
TPU_PRODUCTS = """
HloModule products
%fused (p0: bf16[32,2,128,8,1], p1: bf16[32,128,2,2,8]) -> f32[32,2,128,128,2] {
  %p0 = bf16[32,2,128,8,1]{2,3,4,1,0:T(8,128)(2,1)} parameter(0)
  %p1 = bf16[32,128,2,2,8]{1,4,3,2,0:T(8,128)(2,1)} parameter(1)
  ROOT %c = f32[32,2,128,128,2]{3,2,4,1,0:T(8,128)} convolution(%p0, %p1), window={size=32x2x2 stride=31x1x1 pad=0_0x0_0x1_1 lhs_dilate=32x2x1 rhs_reversal=0x0x1}, dim_labels=01bf2_0o12i->01bf2
}
ENTRY %main (a: bf16[32,2,128,8,1], b: bf16[32,128,2,2,8]) -> f32[32,2,128,128,2] {
  %a = bf16[32,2,128,8,1]{2,3,4,1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[32,128,2,2,8]{1,4,3,2,0:T(8,128)(2,1)S(1)} parameter(1)
  ROOT %f = f32[32,2,128,128,2]{3,2,4,1,0:T(8,128)} fusion(%a, %b), kind=kOutput, calls=%fused, backend_config={"window_config":{"estimated_cycles":"1234","iteration_bounds":["1"]}}
}
"""
SCORES = 2 * 32 * 4 * 128 * 128 * 8  # 32 rows, 2 key heads x 2 queries each, 128 x 128, heads of 8


def test_tpu_products_are_convolutions_of_which_a_part_is_real():
    program = Program(TPU_PRODUCTS)
    assert program.flops == SCORES
    (op,) = program.ops
    assert op.cycles == 1234
    # %b is in the chip's own memory.
    assert op.bytes == 2 * (32 * 2 * 128 * 8) + 4 * (32 * 2 * 128 * 128 * 2)


def test_a_kernel_counts_what_it_says_of_itself():
    kernel = '%k = f32[2]{0} custom-call(%a), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"body":"x","cost_estimate":{"flops":"77","bytes_accessed":"5"}}}'
    program = Program(TPU_PRODUCTS.replace("ROOT %f", f"{kernel}\n  ROOT %f"))
    assert program.flops == SCORES
    assert [(op.flops, op.kernel) for op in program.ops] == [(77, True), (SCORES, False)]


def test_convolutions_count_as_jax_multiplies_them():
    def convolve(x, w):
        return jax.lax.conv_general_dilated(x, w, (2,), "SAME")

    text = jax.jit(convolve).lower(
        jax.ShapeDtypeStruct((2, 3, 16), jnp.float32), jax.ShapeDtypeStruct((5, 3, 4), jnp.float32)
    )
    program = Program(text.compile().as_text())
    found = [
        (scope, x)
        for scope, inside in program.computations.items()
        for x in inside.values()
        if x.opcode == "convolution"
    ]
    if not found:  # the CPU backend may call a library
        pytest.skip("compiled to a custom call here")
    # 8 outputs of 4 taps each, of which one of the first and one of the last meet padding.
    (scope, x) = found[0]
    lhs, rhs = (program.computations[scope][name].arrays[0].shape for name in x.operands)
    assert convolution_flops(x, lhs, rhs) == 2 * 2 * 3 * 5 * (8 * 4 - 2)


def test_collectives_are_counted_with_what_a_ring_sends():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    split, whole = (NamedSharding(mesh, PartitionSpec(*p)) for p in (("x",), ()))

    def layers(x):
        return jax.lax.scan(lambda c, _: (jnp.sin(c) * jnp.sum(c), None), x, None, length=5)[0]

    args = jax.ShapeDtypeStruct((64,), jnp.float32, sharding=split)
    text = jax.jit(layers, out_shardings=split).lower(args).compile().as_text()
    assert Program(text).bytes_sent() == {"all-reduce": 5 * 2 * 4 * 7 // 8}
    text = jax.jit(lambda x: x, out_shardings=whole).lower(args).compile().as_text()
    assert Program(text).bytes_sent() == {"all-gather": 64 * 4 * 7 // 8}


def test_a_collective_in_several_fusions_is_one():
    gather = (
        "%g = f32[64]{0} all-gather(%p), channel_id=7, replica_groups=[1,8]<=[8], dimensions={0}"
    )
    text = f"""
HloModule overlapped
%one (p: f32[8]) -> f32[64] {{
  %p = f32[8]{{0}} parameter(0)
  ROOT {gather}
}}
%two (p: f32[8]) -> f32[64] {{
  %p = f32[8]{{0}} parameter(0)
  ROOT {gather}
}}
ENTRY %main (a: f32[8]) -> f32[64] {{
  %a = f32[8]{{0}} parameter(0)
  %x = f32[64]{{0}} fusion(%a), kind=kLoop, calls=%one
  ROOT %y = f32[64]{{0}} fusion(%a), kind=kLoop, calls=%two
}}
"""
    assert Program(text).bytes_sent() == {"all-gather": 64 * 4 * 7 // 8}


def test_metadata_may_hold_line_breaks():
    text = TPU_PRODUCTS.replace(
        "ROOT %f", '%k = f32[2]{0} custom-call(%a), metadata={op_name="two\nlines (("}\n  ROOT %f'
    )
    assert Program(text).flops == SCORES


def test_a_slice_of_an_operand_is_all_that_is_read():
    def layer(x, w, i):
        return x * jax.lax.dynamic_index_in_dim(w, i, keepdims=False)

    args = [
        jax.ShapeDtypeStruct(shape, kind)
        for shape, kind in (((1024,), jnp.float32), ((32, 1024), jnp.float32), ((), jnp.int32))
    ]
    program = Program(jax.jit(layer).lower(*args).compile().as_text())
    assert sum(op.bytes for op in program.ops) < 4 * 1024 * 8  # and not 32 rows


def test_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match="ENTRY"):
        hlo.Program("HloModule empty")


SLICED_WITHIN = """
HloModule sliced
%inner (p0: bf16[32,8,128], p1: s32[]) -> bf16[1,8,128] {
  %p0 = bf16[32,8,128]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %slice = bf16[1,8,128]{2,1,0} dynamic-slice(%p0, %p1, %zero, %zero), dynamic_slice_sizes={1,8,128}
}
%outer (a: bf16[32,8,128], i: s32[]) -> bf16[1,8,128] {
  %a = bf16[32,8,128]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  ROOT %f = bf16[1,8,128]{2,1,0} fusion(%a, %i), kind=kLoop, calls=%inner
}
ENTRY %main (x: bf16[32,8,128], j: s32[]) -> bf16[1,8,128] {
  %x = bf16[32,8,128]{2,1,0} parameter(0)
  %j = s32[] parameter(1)
  ROOT %g = bf16[1,8,128]{2,1,0} fusion(%x, %j), kind=kOutput, calls=%outer
}
"""


def test_of_what_a_fusion_within_a_fusion_slices_the_slice_is_read():
    """A layer's slice of all layers' inputs, say: 1 of 32 is read and written, and the index."""
    (op,) = Program(SLICED_WITHIN).ops
    assert op.bytes == 2 * (8 * 128 * 2) + 4
