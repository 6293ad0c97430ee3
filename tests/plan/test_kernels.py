"""Cycles of Pallas kernels, counted from their instructions in libtpu's format."""

from convnext_jax.plan.hlo import read_program
from convnext_jax.plan.kernels import count_cycles, kernel_cycles, listing_flags

LISTING = """
= control target key start
LB: loop body
= control target key end

     0   :  { %1 = vsyncpa [#allocation5], 0  ;;  %s2_s9 = smov.u32 0 /* copy for cssa */ }
   0x1 LB: > { %s3_s1 = sadd.s32 4294967295, %s2_s9 /* iteration index, stage = 1 */ } /* Start region 9 */
   0x2 LB: >> { %s4_s2 = smul.u32 224, %s3_s1 } /* Start region 4 :: Start region 5 */
   0x3   : >> { %p7_p1 = scmp.ge.s32.totalorder %s4_s2, 6 /* loop exit test */ }
   0x4   : >> { %8 = sbr.rel (!%p7_p1) target = $region4  ;;  %9 = sbr.rel (%p2_p5) target = $region5 }
   0x5   : > { %p10_p2 = scmp.ge.s32.totalorder (%p7_p1), %s3_s1, 10 /* loop exit test */ }
   0x6   : > { %14 = sbr.rel (!%p10_p2) target = $region9 }
   0x7   :  { %15 = vsyncpa [#allocation5], 1 }
"""
CYCLES = 1 + 8 * (1 + 6 * 3 + 2) + 1  # a grid of 8, of which two of the loop's 10 iterations only copy

PROGRAM = """ENTRY %main (p: f32[8]) -> f32[8] {
  %depthwise.1 = f32[8]{0} custom-call(%p), custom_call_target="tpu_custom_call", metadata={op_name="a/pallas_call"}
  %depthwise.2 = f32[8]{0} custom-call(%depthwise.1), custom_call_target="tpu_custom_call"
  ROOT %depthwise.3 = f32[4]{0} custom-call(%depthwise.2), custom_call_target="tpu_custom_call"
}"""


def test_instructions_in_loops_count_once_per_iteration():
    """The plan would count a thousand cycles for a kernel of a million cycles, and recommend it."""
    assert count_cycles(LISTING) == CYCLES


def test_kernels_get_the_cycles_of_their_own_instructions(tmp_path):
    """The plan would count only one of several equal kernels, or give a kernel the cycles of another one."""
    (tmp_path / '1795811036959046928-fusion.1-01-final_bundles.txt').write_text(LISTING)
    (tmp_path / '1795811036959046928-depthwise.2-00-schedule-analysis_final_bundles.txt').write_text('total: 9')
    (tmp_path / '1795811036959046929-depthwise.2-01-final_bundles.txt').write_text(LISTING)
    cycles = kernel_cycles(PROGRAM, tmp_path)
    assert cycles == {'depthwise.1': CYCLES, 'depthwise.2': CYCLES}
    assert [instruction.cycles for instruction in read_program(PROGRAM, cycles)] == [CYCLES, CYCLES, 0]


def test_the_compiler_is_asked_for_the_final_instructions_alone(tmp_path):
    """The listings of all passes would take gigabytes."""
    assert f'--xla_jf_dump_to={tmp_path} ' in listing_flags(tmp_path)
    assert listing_flags(tmp_path).endswith('pass_label_regex=final_bundles')
