"""Tests `benchmarks.audit.instructions`: compares its counts with counts by hand."""

import numpy as np
import pytest

from benchmarks.audit.instructions import Flow
from benchmarks.audit.sass import parse_instructions
from benchmarks.audit.trips import LoopTrips, loop_trips

# Machine code of three parts:
# - a slow path that calls a routine,
# - an outer loop that contains an inner loop and calls the routine,
# - the routine.
NESTED = """
/*0000*/            MOV R1, c[0x0][0x28] ;
/*0010*/            ISETP.GE.AND P0, PT, R2, 0x1, PT ;
/*0020*/            BSSY B0, 0x60 ;
/*0030*/       @!P0 BRA 0x60 ;
/*0040*/            MOV R2, 0x60 ;
/*0050*/            CALL.REL.NOINC 0x120 ;
/*0060*/            BSYNC B0 ;
/*0070*/        @P1 BRA 0x100 ;
/*0080*/            LDG.E.128 R4, desc[UR4][R2.64] ;
/*0090*/            FADD R8, R4, R8 ;
/*00a0*/            ISETP.GE.AND P2, PT, R9, 0x1, PT ;
/*00b0*/        @P2 BRA 0x90 ;
/*00c0*/            CALL.REL.NOINC 0x120 ;
/*00d0*/            IADD3 R2, R2, 0x10, RZ ;
/*00e0*/            ISETP.GE.AND P3, PT, R2, R3, PT ;
/*00f0*/       @!P3 BRA 0x80 ;
/*0100*/            STG.E.128 desc[UR4][R2.64], R8 ;
/*0110*/            EXIT ;
/*0120*/            IMAD R2, R2, R3, RZ ;
/*0130*/            RET.REL.NODEC R10 0x0 ;
/*0140*/            BRA 0x140;
/*0150*/            NOP;
"""
# A loop that is left by a call used as a jump, and a loop that is left by an EXIT.
OTHER_ENDS = """
/*0000*/            MOV R1, c[0x0][0x28] ;
/*0010*/            FADD R8, R4, R8 ;
/*0020*/        @P0 BRA 0x40 ;
/*0030*/            FMUL R8, R4, R8 ;
/*0040*/        @P1 CALL.REL.NOINC 0x60 ;
/*0050*/            BRA 0x10 ;
/*0060*/            STG.E desc[UR4][R2.64], R8 ;
/*0070*/            FADD R8, R4, R8 ;
/*0080*/        @P2 EXIT ;
/*0090*/            IADD3 R2, R2, 0x10, RZ ;
/*00a0*/            BRA 0x70 ;
/*00b0*/            BRA 0xb0;
"""
# A loop that is unrolled by four, and code that runs the remaining trips.
UNROLLED = """
/*0000*/       @!P0 BRA 0x70 ;
/*0010*/            STG.E desc[UR4][R2.64], R8 ;
/*0020*/            STG.E desc[UR4][R2.64], R8 ;
/*0030*/            STG.E desc[UR4][R2.64], R8 ;
/*0040*/            STG.E desc[UR4][R2.64], R8 ;
/*0050*/            IADD3 R2, R2, 0x10, RZ ;
/*0060*/        @P1 BRA 0x10 ;
/*0070*/       @!P2 BRA 0xa0 ;
/*0080*/            STG.E desc[UR4][R2.64], R8 ;
/*0090*/            STG.E desc[UR4][R2.64], R8 ;
/*00a0*/       @!P3 BRA 0xc0 ;
/*00b0*/            STG.E desc[UR4][R2.64], R8 ;
/*00c0*/            EXIT ;
"""
TTGIR = """
module {
  tt.func public @k(%x_ptr: !tt.ptr<f32> {tt.divisibility = 16 : i32}, %rows: i32, %count: i32) {
    %c128_i32 = arith.constant 128 : i32 loc(#loc1)
    %c0_i32 = arith.constant 0 : i32
    %cst = arith.constant dense<0.0> : tensor<128xf32>
    %c512_i32 = arith.constant 512 : i32
    %0 = tt.get_program_id y : i32 loc(#loc2)
    %low = arith.muli %0, %rows : i32
    %1 = arith.addi %low, %rows overflow<nsw> : i32
    %stop = arith.minsi %1, %count : i32
    %2 = arith.subi %stop, %low : i32
    %3 = arith.divsi %2, %c512_i32 : i32
    %4 = arith.muli %3, %c512_i32 : i32
    %full = arith.addi %low, %4 : i32
    %sum.1_4 = scf.for %row.2_1 = %low to %full step %c512_i32 iter_args(%s = %cst) -> (f32) : i32 {
      %5 = "tt.reduce"(%s) <{axis = 0 : i32}> ({
      }) : (tensor<128xf32>) -> f32
      %inner = scf.for %i = %c0_i32 to %rows step %c128_i32 iter_args(%t = %5) -> (f32) : i32 {
        scf.yield %t : f32
      }
      scf.yield %inner : f32
    }
    %tail = scf.for %row = %full to %stop step %c128_i32 iter_args(%s = %sum.1_4) -> (f32) : i32 {
      scf.yield %s : f32
    }
    %6 = tt.load %x_ptr : !tt.ptr<i32>
    scf.for %row = %c0_i32 to %6 step %c128_i32 : i32 {
    } {tt.num_stages = 2 : i32}
  }
}
"""


def trips(depth: int, *each: int) -> LoopTrips:
    return LoopTrips(depth, np.array(each))


def test_nested_loops_a_call_and_a_slow_path():
    loops = [trips(0, 3, 1, 0, 4), trips(1, 1, 2, 5, 3)]
    flow = Flow(parse_instructions(NESTED), loops)
    # Counts are means over four programs. ``loops`` has the trips of each program. 8 instructions
    # run once in every program. 5 instructions of the outer loop run 3, 1, 0 and 4 times, which is
    # twice on average. 3 instructions of the inner loop run 3·1, 1·2, 0·5 and 4·3 times, which is
    # 4.25 times on average. The slow path never runs, and the routine is not counted.
    assert sum(count for _, count in flow.executed) == 8 + 5 * 2 + 3 * 4.25
    assert {i.address for i, count in flow.executed if not count} == {0x40, 0x50}
    assert flow.calls_in_loops == 1
    assert [i.address for i in flow.main_loop] == [0x90, 0xA0, 0xB0]


def test_other_ends_of_loops():
    flow = Flow(parse_instructions(OTHER_ENDS), [trips(0, 5), trips(0, 2)])
    assert [count for _, count in flow.executed] == [1, 5, 5, 5, 5, 5, 1, 2, 2, 2, 2]
    assert flow.calls_in_loops == 0


def test_unrolled_loop():
    loop = LoopTrips(0, np.array([11, 4, 1, 2]), accesses=1)
    flow = Flow(parse_instructions(UNROLLED), [loop])
    assert flow.unrolled == [4]
    assert sum(count for i, count in flow.executed if i.name == "STG") == (11 + 4 + 1 + 2) / 4
    # The loop's two other instructions run once per four trips: twice in the first program, once in
    # the second, and never in the last two.
    assert sum(count for i, count in flow.executed if i.address in (0x50, 0x60)) == 2 * (2 + 1) / 4


def test_loops_that_do_not_match_their_trips_are_refused():
    flow = Flow(parse_instructions(NESTED), [trips(0, 3)])
    with pytest.raises(ValueError, match=r"depths \[0, 1\], but .* depths \[0\]"):
        flow.executed  # noqa: B018
    # If the trips are unknown, the main loop is the longest loop.
    assert [i.address for i in flow.main_loop] == list(range(0x80, 0x100, 0x10))
    loops = [trips(0, 3), LoopTrips(1, None)]
    with pytest.raises(ValueError, match="trips must be known for every loop, got None"):
        Flow(parse_instructions(NESTED), loops).executed  # noqa: B018


def test_trips_from_the_bounds_of_loops():
    arguments = {"rows": 1200, "count": 2500, "x_ptr": None}
    found = loop_trips({"ttgir": TTGIR, "ptx": ""}, (2, 3), arguments)
    assert [loop.depth for loop in found] == [0, 1, 0, 0]
    main, inner, tail, by_data = (loop.trips for loop in found)
    # The grid has 2×3 programs. Along its second axis, they have 1200, 1200 and 100 rows.
    assert main.tolist() == [2, 2, 0] * 2
    assert inner.tolist() == [10] * 6
    assert tail.tolist() == [2, 2, 1] * 2
    assert by_data is None
