"""Bytes moved, read from compiled programs: small ones, whose numbers can be added up by hand."""

import pytest

from hippocampus.planning.hlo import count_runs, parse, shapes
from hippocampus.planning.traffic import COLLECTIVES, group_size, ring_bytes, traffic

HEADER = "HloModule jit_step, is_scheduled=true, num_partitions=8\n\n"
ADD = """%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%a, %b)
}

"""


def program(body: str, before: str = "", result: str = "f32[4]") -> str:
    lines = "\n".join(line if line.startswith(("}", '"')) else f"  {line.strip()}"
                      for line in body.strip().splitlines())
    return f"{HEADER}{ADD}{before}ENTRY %main (x: f32[4]) -> {result} {{\n{lines}\n}}\n"


def sent(body: str, before: str = "") -> dict[str, int]:
    found = traffic(parse(program(body, before)))
    return {kind: size for kind, size in found.sent.items() if found.count[kind]}


# ---------------------------------------------------------------- types

@pytest.mark.parametrize(("text", "sizes"), [
    ("f32[2,3]{1,0:T(8,128)}", [24]), ("bf16[1024]{0}", [2048]), ("pred[]", [1]),
    ("s4[3]", [2]), ("f8e4m3fn[5]", [5]), ("f32[0,7]", [0]), ("c64[2]", [16]),
    ("(f32[2]{0}, /*index=1*/bf16[2,2]{1,0:T(8,128)(2,1)}, token[])", [8, 8, 0]),
])
def test_bytes_of_a_type(text, sizes):
    assert [shape.bytes for shape in shapes(text)] == sizes


def test_an_array_in_the_on_chip_memory_is_told_apart():
    here, there = shapes("(f32[2]{0:T(256)S(1)}, f32[2]{0:T(256)})")
    assert (here.in_main_memory, there.in_main_memory) == (False, True)


# ---------------------------------------------------------------- collectives

@pytest.mark.parametrize(("kind", "operand", "group", "bytes_sent"), [
    ("all-reduce", 800, 8, 1400), ("all-reduce", 800, 2, 800), ("reduce-scatter", 800, 8, 700),
    ("all-gather", 100, 8, 700), ("all-to-all", 800, 4, 600), ("collective-permute", 64, 8, 64),
])
def test_bytes_that_a_ring_sends(kind, operand, group, bytes_sent):
    assert ring_bytes(kind, operand, group) == bytes_sent


def test_a_scattered_and_gathered_array_costs_what_its_all_reduce_does():
    whole, n = 4096, 16
    assert (ring_bytes("reduce-scatter", whole, n) + ring_bytes("all-gather", whole / n, n)
            == ring_bytes("all-reduce", whole, n))


@pytest.mark.parametrize(("groups", "size"), [
    ("replica_groups={{0,1,2,3},{4,5,6,7}}", 4), ("replica_groups={{0},{1}}", 1),
    ("replica_groups=[2,4]<=[8]", 4), ("replica_groups=[4,2]<=[2,4]T(1,0)", 2),
    ("replica_groups={}", 8), ("channel_id=3", 8),
    ("replica_groups=mesh['data'=4,'fsdp'=2] {'data'}", 4),
    ("replica_groups=mesh['data'=4,'fsdp'=2] {'fsdp'}", 2),
    ("replica_groups=mesh['data'=4,'fsdp'=2] {'data', 'fsdp'}", 8),
    ("replica_groups=mesh['data'=4,'fsdp'=2] {'data':(1)2}", 2),
])
def test_size_of_a_group_in_every_form(groups, size):
    assert group_size(f", {groups}, use_global_device_ids=true", 8) == size


def test_each_kind_is_counted_in_its_bytes():
    assert sent("""
        %x = f32[4]{0} parameter(0)
        %big = bf16[8,16]{1,0} broadcast(%x), dimensions={}
        %r = bf16[8,16]{1,0} all-reduce(%big), replica_groups=[1,8]<=[8], to_apply=%add
        %g = bf16[64,16]{1,0} all-gather(%big), replica_groups=[1,8]<=[8], dimensions={0}
        %s = bf16[1,16]{1,0} reduce-scatter(%big), replica_groups=[1,8]<=[8], to_apply=%add
        %t = bf16[8,16]{1,0} all-to-all(%big), replica_groups=[2,4]<=[8], dimensions={0}
        ROOT %p = bf16[8,16]{1,0} collective-permute(%big), source_target_pairs={{0,1},{1,0}}
    """) == {"all-reduce": 448, "all-gather": 256 * 7, "reduce-scatter": 224, "all-to-all": 192,
             "collective-permute": 256}


def test_a_tuple_of_arrays_is_one_collective_of_all_their_bytes():
    body = """
        %x = f32[4]{0} parameter(0)
        %y = bf16[6]{0} constant({...})
        %r = (f32[4]{0}, /*index=1*/bf16[6]{0}) all-reduce(%x, /*index=1*/%y), replica_groups={}, to_apply=%add
        ROOT %e = f32[4]{0} get-tuple-element(%r), index=0
    """  # noqa: E501
    assert sent(body) == {"all-reduce": 49}
    assert traffic(parse(program(body))).count["all-reduce"] == 1


def test_a_start_and_its_done_are_one_collective():
    assert sent("""
        %x = f32[4]{0} parameter(0)
        %s = (f32[4]{0}, f32[32]{0}) all-gather-start(%x), replica_groups=[1,8]<=[8], dimensions={0}
        %d = f32[32]{0} all-gather-done(%s)
        %ps = (f32[4]{0}, f32[4]{0}, u32[], u32[]) collective-permute-start(%x), source_target_pairs={{0,1}}
        %pd = f32[4]{0} collective-permute-done(%ps)
        %rs = f32[4]{0} all-reduce-start(%x), replica_groups={}, to_apply=%add
        ROOT %rd = f32[4]{0} all-reduce-done(%rs)
    """) == {"all-gather": 112, "collective-permute": 16, "all-reduce": 28}  # noqa: E501


GATHER = ("all-gather(%p0), channel_id=5, replica_groups=[1,8]<=[8], dimensions={0}, "
          'frontend_attributes={chain_id="3"}')
CHAIN = f"""%begin (p0: f32[4]) -> (f32[4], f32[32], u32[]) {{
  %p0 = f32[4]{{0}} parameter(0)
  %g1 = f32[32]{{0}} {GATHER}
  ROOT %c1 = (f32[4]{{0}}, f32[32]{{0}}, u32[]{{:S(2)}}) custom-call(%g1), custom_call_target="AsyncCollectiveStart"
}}

%meanwhile (p0: f32[4], p1: f32[32], p2: u32[], p3: f32[16]) -> (f32[16], f32[4], f32[32], u32[]) {{
  %p0 = f32[4]{{0}} parameter(0)
  %p1 = f32[32]{{0}} parameter(1)
  %p2 = u32[]{{:S(2)}} parameter(2)
  %p3 = f32[16]{{0}} parameter(3)
  %g2 = f32[32]{{0}} {GATHER}
  %own = f32[16]{{0}} add(%p3, %p3)
  ROOT %t = (f32[16]{{0}}, f32[4]{{0}}, f32[32]{{0}}, u32[]{{:S(2)}}) tuple(%own, %p0, %g2, %p2)
}}

%end (p0: f32[4], p1: f32[32], p2: u32[]) -> f32[32] {{
  %p0 = f32[4]{{0}} parameter(0)
  %p1 = f32[32]{{0}} parameter(1)
  %p2 = u32[]{{:S(2)}} parameter(2)
  %g3 = f32[32]{{0}} {GATHER}
  ROOT %c3 = f32[32]{{0}} custom-call(%p0, %p1, %g3, %p2), custom_call_target="AsyncCollectiveDone"
}}

"""  # noqa: E501


def test_a_collective_that_the_tpu_compiler_stretches_over_fusions_moves_its_bytes_once():
    found = traffic(parse(program("""
        %x = f32[4]{0} parameter(0)
        %y = f32[16]{0} constant({...})
        %s = (f32[4]{0}, f32[32]{0}, u32[]{:S(2)}) fusion(%x), kind=kCustom, calls=%begin
        %s0 = f32[4]{0} get-tuple-element(%s), index=0
        %s1 = f32[32]{0} get-tuple-element(%s), index=1
        %s2 = u32[]{:S(2)} get-tuple-element(%s), index=2
        %m = (f32[16]{0}, f32[4]{0}, f32[32]{0}, u32[]{:S(2)}) fusion(%s0, %s1, %s2, %y), kind=kOutput, calls=%meanwhile
        %m0 = f32[4]{0} get-tuple-element(%m), index=1
        %m1 = f32[32]{0} get-tuple-element(%m), index=2
        %m2 = u32[]{:S(2)} get-tuple-element(%m), index=3
        ROOT %e = f32[32]{0} fusion(%m0, %m1, %m2), kind=kCustom, calls=%end
    """, CHAIN, "f32[32]")))  # noqa: E501
    assert (found.sent["all-gather"], found.count["all-gather"]) == (16 * 7, 1)
    # The gather reads 16 bytes and writes 128; what is done meanwhile reads 64 and writes 64.
    assert found.memory == 16 + 128 + 64 + 64


def test_a_collective_wrapped_in_an_async_call_counts_once():
    wrapped = """%wrapped (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  ROOT %t = f32[4]{0} all-to-all(%p), replica_groups={}, dimensions={0}
}

"""
    assert sent("""
        %x = f32[4]{0} parameter(0)
        %s = ((f32[4]{0}), f32[4]{0}, u32[]) async-start(%x), calls=%wrapped
        %u = ((f32[4]{0}), f32[4]{0}, u32[]) async-update(%s), calls=%wrapped
        ROOT %d = f32[4]{0} async-done(%u), calls=%wrapped
    """, wrapped) == {"all-to-all": 14}


def test_an_all_reduce_fused_with_a_slice_is_a_reduce_scatter():
    fused = """%all-reduce-scatter.3 (p: f32[4]) -> f32[1] {
  %p = f32[4]{0} parameter(0)
  %i = s32[] constant(0)
  %r = f32[4]{0} all-reduce(%p), replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %t = f32[1]{0} dynamic-slice(%r, %i), dynamic_slice_sizes={1}
}

"""
    assert sent("""
        %x = f32[4]{0} parameter(0)
        ROOT %f = f32[1]{0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.3
    """, fused) == {"reduce-scatter": 12}


def test_a_group_of_one_sends_nothing():
    assert sent("""
        %x = f32[4]{0} parameter(0)
        ROOT %r = f32[4]{0} all-reduce(%x), replica_groups={{0},{1}}, to_apply=%add
    """) == {}


# ---------------------------------------------------------------- loops

def loop(name: str, bound: str, body: str = "", test: str = "direction=LT") -> str:
    """A body that all-reduces 4 numbers, and a condition that compares with `bound`."""
    return f"""%{name}.body (c: (s32[], f32[4])) -> (s32[], f32[4]) {{
  %c = (s32[], f32[4]{{0}}) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %v = f32[4]{{0}} get-tuple-element(%c), index=1
  %r = f32[4]{{0}} all-reduce(%v), replica_groups={{}}, to_apply=%add
{body}  ROOT %t = (s32[], f32[4]{{0}}) tuple(%i, %r)
}}

%{name}.condition (c: (s32[], f32[4])) -> pred[] {{
  %n = s32[]{{:T(128)}} {bound}
  %c = (s32[], f32[4]{{0}}) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  ROOT %lt = pred[] compare(%i, %n), {test}
}}

"""


def while_line(name: str, extra: str = "") -> str:
    return (f"%w = (s32[], f32[4]{{0}}) while(%z), condition=%{name}.condition, "
            f"body=%{name}.body{extra}")


def looped(name: str = "l", extra: str = "") -> str:
    return f"""
        %x = f32[4]{{0}} parameter(0)
        %zero = s32[] constant(0)
        %z = (s32[], f32[4]{{0}}) tuple(%zero, %x)
        {while_line(name, extra)}
        ROOT %e = f32[4]{{0}} get-tuple-element(%w), index=1
    """


def test_a_loop_multiplies_by_the_constant_that_its_counter_is_compared_with():
    assert sent(looped(), loop("l", "constant(12)")) == {"all-reduce": 28 * 12}


def test_the_compilers_own_trip_count_comes_first():
    known = ', backend_config={"known_trip_count":{"n":"5"}}'
    assert sent(looped(extra=known), loop("l", "constant(12)")) == {"all-reduce": 28 * 5}


@pytest.mark.parametrize("before", [
    loop("l", "parameter(1)"), loop("l", "constant(12)", test="direction=NE")])
def test_a_loop_of_unknown_length_counts_once_and_is_named(before):
    found = traffic(parse(program(looped(), before)))
    assert found.sent["all-reduce"] == 28 and found.unknown_loops == ("w",)


def test_a_comparison_inside_a_fusion_is_found():
    before = loop("l", "constant(7)").replace(
        "ROOT %lt = pred[] compare(%i, %n), direction=LT",
        "ROOT %lt = pred[] fusion(%i, %n), kind=kLoop, calls=%compare")
    compare = """%compare (i: s32[], n: s32[]) -> pred[] {
  %i = s32[] parameter(0)
  %n = s32[] parameter(1)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

"""
    assert sent(looped(), compare + before) == {"all-reduce": 28 * 7}


def test_loops_inside_loops_multiply():
    inner = loop("inner", "constant(3)")
    outer = loop("outer", "constant(4)",
                 body="  %z = (s32[], f32[4]{0}) tuple(%i, %v)\n  " + while_line("inner") + "\n")
    counts = count_runs(parse(program(looped("outer"), inner + outer)))
    assert counts.executed["outer.body"] == 4 and counts.executed["inner.body"] == 12
    assert sent(looped("outer"), inner + outer) == {"all-reduce": 28 * (4 + 12)}


# ---------------------------------------------------------------- memory

def memory(body: str, before: str = "") -> int:
    return traffic(parse(program(body, before))).memory


def test_operands_are_read_and_results_written():
    assert memory("""
        %x = f32[4]{0} parameter(0)
        %y = f32[4,8]{1,0} broadcast(%x), dimensions={0}
        ROOT %d = f32[8]{0} dot(%x, %y), lhs_contracting_dims={0}, rhs_contracting_dims={0}
    """) == (16 + 128) + (16 + 128 + 32)


def test_what_stays_on_the_chip_is_no_memory_traffic():
    assert memory("""
        %x = f32[4]{0:T(128)} parameter(0)
        %s = (f32[4]{0:T(128)S(1)}, f32[4]{0:T(128)}, u32[]{:S(2)}) copy-start(%x)
        %d = f32[4]{0:T(128)S(1)} copy-done(%s)
        %y = f32[4]{0:T(128)S(1)} negate(%d)
        ROOT %z = f32[4]{0:T(128)} negate(%y)
    """) == 16 + 16


def test_a_slice_that_is_fetched_early_moves_its_window_only():
    assert memory("""
        %x = f32[100,4]{1,0:T(8,128)} parameter(0)
        %s = ((f32[100,4]{1,0:T(8,128)}), f32[8,4]{1,0:T(8,128)S(3)}, s32[]{:S(2)}) slice-start(%x)
        %d = f32[8,4]{1,0:T(8,128)S(3)} slice-done(%s)
        ROOT %z = f32[8,4]{1,0:T(8,128)} negate(%d)
    """) == 128 + 128


def test_line_breaks_and_braces_in_a_kernels_attributes_do_not_end_its_computation():
    assert memory("""
        %x = f32[4]{0} parameter(0)
        %k = f32[4]{0} custom-call(%x), custom_call_target="tpu_custom_call", attributes={metadata={
    """ + '"{block: 512}"\n}}, backend_config={}' + """
        ROOT %z = f32[4]{0} negate(%k)
    """) == (16 + 16) + (16 + 16)


def test_a_collective_reads_its_operand_and_writes_its_result_once():
    assert memory("""
        %x = f32[4]{0} parameter(0)
        %s = (f32[4]{0}, f32[32]{0}) all-gather-start(%x), replica_groups=[1,8]<=[8], dimensions={0}
        %d = f32[32]{0} all-gather-done(%s)
        %rs = f32[4]{0} all-reduce-start(%x), replica_groups={}, to_apply=%add
        ROOT %rd = f32[4]{0} all-reduce-done(%rs)
    """) == (16 + 128) + (16 + 16)


def test_only_the_window_of_a_slice_or_an_update_is_moved():
    assert memory("""
        %x = f32[4]{0} parameter(0)
        %i = s32[] constant(0)
        %all = f32[100,4]{1,0} custom-call(), custom_call_target="AllocateBuffer"
        %s = f32[1,4]{1,0} dynamic-slice(%all, %i, %i), dynamic_slice_sizes={1,4}
        ROOT %u = f32[100,4]{1,0} dynamic-update-slice(%all, %s, %i, %i)
    """) == 1600 + 32 + 32


FUSED = """%cut (p: f32[100,4], i: s32[]) -> f32[4] {
  %p = f32[100,4]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %b = f32[100,4]{1,0} bitcast(%p)
  %s = f32[1,4]{1,0} dynamic-slice(%b, %i, %i), dynamic_slice_sizes={1,4}
  ROOT %r = f32[4]{0} negate(%s)
}

%store (p: f32[100,4], u: f32[1,4], i: s32[]) -> f32[100,4] {
  %p = f32[100,4]{1,0} parameter(0)
  %u = f32[1,4]{1,0} parameter(1)
  %i = s32[] parameter(2)
  ROOT %r = f32[100,4]{1,0} dynamic-update-slice(%p, %u, %i, %i)
}

"""


def test_a_fusion_reads_the_window_it_cuts_and_writes_the_window_it_updates():
    assert memory("""
        %x = f32[4]{0} parameter(0)
        %i = s32[] constant(0)
        %all = f32[100,4]{1,0} parameter(1)
        %s = f32[4]{0} fusion(%all, %i), kind=kLoop, calls=%cut
        %u = f32[1,4]{1,0} bitcast(%s)
        ROOT %w = f32[100,4]{1,0} fusion(%all, %u, %i), kind=kLoop, calls=%store
    """, FUSED) == (16 + 4 + 16) + (16 + 4 + 16)


def test_the_body_of_a_loop_moves_memory_in_every_round():
    body = "  %y = f32[4]{0} negate(%v)\n"
    once, often = (memory(looped(), loop("l", f"constant({n})", body)) for n in (1, 10))
    assert often == 10 * once and once == 32 + 32 + (4 + 4 + 1)


# ---------------------------------------------------------------- what XLA really writes

def test_a_compiled_program_of_this_jax_is_read_as_xla_counts_it():
    import jax
    import jax.numpy as jnp

    def f(x, w):
        return jnp.tanh(x @ w) @ w

    compiled = jax.jit(f).lower(jnp.zeros((64, 32)), jnp.zeros((32, 32))).compile()
    found = traffic(parse(compiled.as_text()))
    assert found.memory == pytest.approx(compiled.cost_analysis()["bytes accessed"], rel=0.02)
    assert found.sent == dict.fromkeys(COLLECTIVES, 0)


def test_a_compiled_scan_of_this_jax_runs_its_body_as_often_as_its_length():
    import jax
    import jax.numpy as jnp

    def f(x, w):
        return jax.lax.scan(lambda c, _: (jnp.tanh(c @ w), None), x, None, length=37)[0]

    compiled = jax.jit(f).lower(jnp.zeros((64, 32)), jnp.zeros((32, 32))).compile()
    counts = count_runs(parse(compiled.as_text()))
    assert 37 in counts.executed.values() and not counts.unknown_loops
