"""The reader of HLO texts on small ones, cut from what the TPU compiler wrote."""

import pytest

from dopsd_jax.planning import hlo

# A loop of 4 around one of 30: a plain gather, one that fusions carry (it starts, goes on in the
# next fusion, and ends), and a loop of 8 in which parts of a product go round. After the kernel's
# text, which has lines and brackets of its own, the computation goes on.
TEXT = '''HloModule jit_train_step, is_scheduled=true, input_output_alias={ {0}: (0, {}, may-alias) }

%add.1 (x.1: f32[], y.1: f32[]) -> f32[] {
  %x.1 = f32[]{:T(128)} parameter(0)
  %y.1 = f32[]{:T(128)} parameter(1)
  ROOT %add.2 = f32[]{:T(128)} add(%x.1, %y.1)
}

%start.1 (p.1: bf16[240,3840]) -> (bf16[240,3840], bf16[3840,3840], s32[2], u32[]) {
  %p.1 = bf16[240,3840]{1,0:T(8,128)(2,1)} parameter(0)
  %all-gather.1 = bf16[3840,3840]{1,0:T(8,128)(2,1)} all-gather(%p.1), channel_id=29, dimensions={0}, frontend_attributes={chain_id="1"}
  ROOT %custom-call.1 = (bf16[240,3840]{1,0:T(8,128)(2,1)S(1)}, bf16[3840,3840]{1,0:T(8,128)(2,1)S(1)}, s32[2]{0:S(4)}, /*index=3*/u32[]{:S(2)}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.1 (p.2: bf16[240,3840]) -> bf16[3840,3840] {
  %p.2 = bf16[240,3840]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.2 = bf16[3840,3840]{1,0:T(8,128)(2,1)} all-gather(%p.2), channel_id=29, dimensions={0}, frontend_attributes={chain_id="1"}
}

%windowed_body.1 (p.3: (s32[], bf16[240,64])) -> (s32[], bf16[240,64]) {
  %p.3 = (s32[]{:T(128)}, bf16[240,64]{1,0:T(8,128)(2,1)}) parameter(0)
  %g.3 = bf16[240,64]{1,0:T(8,128)(2,1)} get-tuple-element(%p.3), index=1
  %collective-permute-start.1 = (bf16[240,64]{1,0:T(8,128)(2,1)}, bf16[240,64]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%g.3), channel_id=3, source_target_pairs={{0,1},{1,0}}
  %collective-permute-done.1 = bf16[240,64]{1,0:T(8,128)(2,1)} collective-permute-done(%collective-permute-start.1)
  ROOT %t.3 = (s32[]{:T(128)}, bf16[240,64]{1,0:T(8,128)(2,1)}) tuple(%g.3, %collective-permute-done.1)
}

%windowed_cond.1 (p.4: (s32[], bf16[240,64])) -> pred[] {
  %p.4 = (s32[]{:T(128)}, bf16[240,64]{1,0:T(8,128)(2,1)}) parameter(0)
  %c.4 = s32[]{:T(128)} constant(8)
  ROOT %lt.4 = pred[]{:T(512)} compare(%p.4, %c.4), direction=LT
}

%layer_body.1 (p.5: (s32[], bf16[30,240,3840])) -> (s32[], bf16[30,240,3840]) {
  %p.5 = (s32[]{:T(128)}, bf16[30,240,3840]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %fusion.1 = (bf16[240,3840]{1,0}, bf16[3840,3840]{1,0}) fusion(%p.5), kind=kCustom, calls=%start.1, backend_config={"estimated_cycles":"100"}
  %splash_mha_fwd.2 = bf16[30,4608,128]{2,1,0:T(8,128)(2,1)} custom-call(%p.5), custom_call_target="tpu_custom_call", metadata={op_name="jit(train_step)/splash_mha_fwd_no_residuals"}, backend_config={"custom_call_config": {"body": "
}}
  }, more"}}
  %fusion.2 = bf16[3840,3840]{1,0} fusion(%fusion.1), kind=kCustom, calls=%async_collective_fusion.1, backend_config={"estimated_cycles":"7"}
  %while.2 = (s32[]{:T(128)}, bf16[240,64]{1,0:T(8,128)(2,1)}) while(%p.5), condition=%windowed_cond.1, body=%windowed_body.1
  %all-gather.3 = bf16[256,15360]{1,0:T(8,128)(2,1)} all-gather(%p.5), channel_id=5, dimensions={0}
  ROOT %t.5 = (s32[]{:T(128)}, bf16[30,240,3840]{2,1,0:T(8,128)(2,1)}) tuple(%p.5, %p.5)
}

%layer_cond.1 (p.6: (s32[], bf16[30,240,3840])) -> pred[] {
  %p.6 = (s32[]{:T(128)}, bf16[30,240,3840]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %zero.6 = s32[]{:T(128)} constant(0)
  %c.6 = s32[]{:T(128)} constant(30)
  ROOT %lt.6 = pred[]{:T(512)} compare(%p.6, %c.6), direction=LT
}

%step_body.1 (p.7: (s32[], bf16[30,240,3840])) -> (s32[], bf16[30,240,3840]) {
  %p.7 = (s32[]{:T(128)}, bf16[30,240,3840]{2,1,0:T(8,128)(2,1)}) parameter(0)
  ROOT %while.1 = (s32[]{:T(128)},
    bf16[30,240,3840]{2,1,0:T(8,128)(2,1)}) while(%p.7), condition=%layer_cond.1, body=%layer_body.1
}

%step_cond.1 (p.8: (s32[], bf16[30,240,3840])) -> pred[] {
  %p.8 = (s32[]{:T(128)}, bf16[30,240,3840]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %c.8 = s32[]{:T(128)} constant(4)
  ROOT %lt.8 = pred[]{:T(512)} compare(%p.8, %c.8), direction=LT
}

ENTRY %main.1 (a.1: bf16[30,240,3840]) -> f32[] {
  %a.1 = bf16[30,240,3840]{2,1,0:T(8,128)(2,1)} parameter(0)
  %while.0 = (s32[]{:T(128)}, bf16[30,240,3840]{2,1,0:T(8,128)(2,1)}) while(%a.1), condition=%step_cond.1, body=%step_body.1
  ROOT %all-reduce.1 = f32[]{:T(128)} all-reduce(%while.0), channel_id=9, to_apply=%add.1
}
'''  # noqa: E501

REPORT = '''Memory Space: default (color=0)
Total bytes: 3625592320 (3.38GiB)
  cumulative_size;       size;       offset; used_by_n_values; shapes_list
  ------------------------------------------------------------
  1012.50MiB( 12%); 1012.50MiB;    192937984;                7; 2xs32[1], 5xbf16[30,1,4608,3840]
    1.09GiB( 13%);  100.00MiB;   1632157696;                1; bf16[5120,10240]

Memory Space: alternate (color=1)
Total bytes: 1000 (1000B)
  cumulative_size;       size;       offset; used_by_n_values; shapes_list
  ------------------------------------------------------------
  2000.00MiB( 12%); 2000.00MiB;    192937984;                7; bf16[1]
'''


@pytest.fixture(scope="module")
def program():
    return hlo.parse(TEXT)


def test_loops_multiply(program):
    times = hlo.executions(program)
    assert times["layer_body.1"] == times["start.1"] == 120
    assert times["windowed_body.1"] == 960 and times["main.1"] == 1
    assert "add.1" not in times


def test_each_collective_counts_once_with_its_size_and_whether_it_overlaps(program):
    found = {(c.op, c.bytes, c.times, c.overlapped) for c in hlo.collectives(program)}
    assert found == {
        ("all-gather", 3840 * 3840 * 2, 120, True),
        ("all-gather", 256 * 15360 * 2, 120, False),
        ("collective-permute", 240 * 64 * 2, 960, True),
        ("all-reduce", 4, 1, False),
    }
    assert len(hlo.collectives(program)) == 4


def test_cycles_count_every_turn(program):
    assert hlo.estimated_cycles(program) == 120 * 107


def test_instructions_over_several_lines_are_one(program):
    (loop,) = [i for i in program.computations["step_body.1"] if i.op == "while"]
    assert loop.name == "while.1" and "body=%layer_body.1" in loop.rest
    assert program.computations["layer_body.1"][-1].op == "tuple"


def test_shapes_are_those_of_the_text():
    shapes = hlo.array_shapes(TEXT)
    assert ("bf16", (30, 240, 3840)) in shapes and ("f32", ()) in shapes
    assert ("bf16", (30, 3840, 3840)) not in shapes
    assert hlo.array_bytes("(bf16[2,3]{1,0:T(8,128)}, pred[5], s4[4], f32[])") == 12 + 5 + 2 + 4


def test_the_memory_report_of_the_chip_alone_is_read():
    memory = hlo.parse_memory(REPORT)
    assert memory.total == 3625592320
    assert memory.largest == [
        (int(1012.5 * 2**20), "2xs32[1], 5xbf16[30,1,4608,3840]"), (100 * 2**20, "bf16[5120,10240]")
    ]


def test_other_texts_are_refused():
    with pytest.raises(ValueError, match="expected a line that begins with ENTRY, found none"):
        hlo.parse("nothing")
    with pytest.raises(ValueError, match="expected 'color=0' and 'Total bytes' in it"):
        hlo.parse_memory("nothing")
