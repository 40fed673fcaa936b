"""Verdicts: simulated programs whose answer is known, and what keeps a verdict from being given."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuscope._data.batch import RowFlag
from gpuscope.analysis.recording import Losses
from gpuscope.analysis.verdict import Findings, judge

from ..generated import recordings
from ..recordings import Stage, recording
from .simulate import Machine
from .workloads import REQUESTS, WORKLOADS, Workload, each, fetch, infer


def machine_after(workload: Workload, **options) -> Machine:
    """Return the machine that has run a workload."""
    machine = Machine(**options)
    workload.run(machine)
    return machine


def judged(name: str) -> Findings:
    """Return the findings on a workload."""
    return judge(machine_after(WORKLOADS[name]).recording())


def verdicts(findings: Findings) -> tuple[str, dict[str, str]]:
    """Return the verdict on the only kind of request, and those on the stages."""
    (request,) = findings.requests
    return request.verdict, {stage.name: stage.verdict for stage in findings.stages}


@pytest.mark.parametrize("asked", [False, True], ids=["not asked", "asked"])
@pytest.mark.parametrize("name", WORKLOADS)
def test_a_program_with_a_known_bottleneck_gets_its_verdict(name, asked):
    """What bounds the requests and the stages of a simulated program is found; unknown is left to what is not asked."""
    machine = machine_after(WORKLOADS[name])
    findings = judge(recording(*machine.asked()) if asked else machine.recording())
    request, stages = verdicts(findings)
    expected = WORKLOADS[name].expected(asked=asked)
    found = {"request": request, **stages}
    assert {stage: found[stage] for stage in expected} == expected, str(findings)


def test_what_took_long_but_for_warmup_comes_first():
    """A model that is warmed up outside requests is no kind of request to begin with, however slow its first call."""
    machine = machine_after(WORKLOADS["large gemm"])
    warm_up = [Stage("model", -(10**9), -10, flags=RowFlag.WARMUP), Stage("model", -9, -5)]
    names = [request.name for request in judge(recording(*warm_up, *machine.roots)).requests]
    assert names == [machine.roots[0].name, "model"]


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(sorted(WORKLOADS)),
    scale=st.floats(1, 20),
    seed=st.integers(0, 99),
    mark=st.text(max_size=3),
    asked=st.booleans(),
)
def test_neither_names_nor_scale_nor_chance_change_a_verdict(name, scale, seed, mark, asked):
    """The same program with other names, slower by any factor and with other random deviations is judged the same."""
    machine = machine_after(WORKLOADS[name], scale=scale, seed=seed, rename=lambda stage: f"{mark}{stage[::-1]}")
    findings = judge(recording(*machine.asked(every=500 * scale, seed=seed)) if asked else machine.recording())
    (request,), stages = findings.requests, {stage.name: stage.verdict for stage in findings.stages}
    expected = WORKLOADS[name].expected(asked=asked)
    assert request.verdict == expected.pop("request"), str(findings)
    # A slower program can be long enough for a verdict on a stage that was too short for one.
    known = {f"{mark}{stage[::-1]}": verdict for stage, verdict in expected.items() if verdict != "unknown"}
    assert {stage: stages[stage] for stage in known} == known, str(findings)


@pytest.mark.parametrize("name", WORKLOADS)
def test_every_verdict_carries_its_figures_and_next_steps(name):
    """Shares between nothing and all, a gain no larger than the request, one or two steps; for unknown, the reason."""
    findings = judged(name)
    for verdict in (*findings.requests, *findings.stages):
        assert verdict.because.endswith(".")
        assert verdict.calls + verdict.warmup_calls + verdict.cold_calls >= REQUESTS
        if verdict.verdict == "unknown":
            assert (verdict.gain_ms, verdict.gain_share, verdict.assumes) == (None, None, None)
            continue
        assert 1 <= len(verdict.next_steps) <= 2
        if verdict.host_ms is None:  # In a graph: what the request would gain is the launcher's to say.
            assert verdict.gain_share is None
            continue
        assert 0 <= verdict.gain_share <= 1
        assert 0 <= verdict.wait_share <= 1
        assert 0 <= verdict.idle_share <= 1
        assert verdict.duration_ms >= verdict.host_ms


def test_findings_are_plain_data_and_print_a_few_lines_a_verdict():
    """For scripts a dictionary that JSON can hold, for people the answer, then verdicts with evidence and steps."""
    findings = judged("heavy preprocess")
    assert json.loads(json.dumps(findings.as_dict())) == findings.as_dict()
    lines = str(findings).splitlines()
    assert lines[0].startswith(
        "`request` is cpu-bound, assuming that `prep` does not wait for the GPU inside. It takes "
    )
    assert lines[1] == "  Try first: Begin with `prep`, which has the largest share in it."
    verdict = lines[lines.index("") + 1]
    assert verdict.startswith("`request`: cpu-bound, assuming that `prep` does not wait for the GPU inside")
    assert any(line.strip() == "- Begin with `prep`, which has the largest share in it." for line in lines)
    assert any("GPU without work:" in line and "in `prep`, host not ready" in line for line in lines)


def test_of_nothing_there_is_nothing_to_say():
    """An empty recording has no verdicts, and says so."""
    findings = judge(recording())
    assert findings.requests == findings.stages == findings.cold == ()
    assert str(findings) == "No stages, no verdicts."


@settings(max_examples=100, deadline=None)
@given(whole=recordings())
def test_any_recording_gets_findings(whole):
    """Whatever the times, the nesting and the attributes are: findings that are plain data and can be printed."""
    findings = judge(whole)
    assert json.loads(json.dumps(findings.as_dict(), allow_nan=False)) == findings.as_dict()
    assert str(findings)


def with_a_varying_host(kernel: float, cost: float, last: float = 0.0) -> Findings:
    """Return what is said of requests that launch 200 kernels, on a host that is now faster and now slower."""
    machine, chance = Machine(), np.random.default_rng(0)
    for _ in range(60):
        with machine.stage("request"):
            slower = chance.uniform(0.85, 1.1)
            with machine.stage("infer"):
                for _ in range(200):
                    machine.launch(kernel, cost=cost * slower)
                machine.launch(last)
            fetch(machine)
    return judge(machine.recording())


@pytest.mark.parametrize(
    ("name", "busy", "idle"),
    [
        ("large model in stages", 0.99, 0.0),
        ("large model, batch of one", 0.42, 0.58),
        ("taking turns", 0.52, 0.48),
        ("heavy preprocess", 0.13, 0.87),
    ],
)
def test_how_busy_the_gpu_is_said_to_be_is_true(name, busy, idle):
    """In the interval lies what the simulated stream did; what is idle is divided among the stages that it was in."""
    (request,) = judge(recording(*machine_after(WORKLOADS[name]).asked(every=300))).requests
    assert request.busy_share == pytest.approx(busy, abs=0.06)
    assert request.busy_range[0] - 0.01 <= busy <= request.busy_range[1] + 0.01
    assert request.idle_share == pytest.approx(idle, abs=0.06)
    inside = [cause for cause in request.idle if cause.cause != "between requests"]
    assert sum(cause.share for cause in inside) == pytest.approx(request.idle_share, abs=0.01)
    assert request.gain_share <= 1


def test_time_between_answers_is_divided_by_where_they_found_no_work():
    """The stage in which the GPU has nothing to do is named, and why is known, as the host was not waiting for it."""
    (request,) = judge(recording(*machine_after(WORKLOADS["item in a loop, one stage"]).asked(every=300))).requests
    assert (request.idle[0].cause, request.idle[0].stage) == ("host not ready", "generate")
    assert request.idle[0].share == pytest.approx(request.idle_share, abs=0.01)


@pytest.mark.parametrize(
    ("program", "verdict", "words"),
    [
        ((100, 90), "gpu-bound", "Calls that the host takes longer to launch take no longer on the GPU (slope "),
        (
            (30, 100, 900),
            "cpu-bound",
            "Calls that the host takes longer to launch take as much longer on the GPU ",
        ),
    ],
    ids=["launching takes nine tenths of the GPU's time", "the GPU waits, and its last kernel is long"],
)
def test_how_the_gpu_moves_with_the_host_tells_where_nobody_asked(program, verdict, words):
    """Both end a little behind the launches. The verdict says which witness it rests on."""
    findings = with_a_varying_host(*program)
    for judgement in (*findings.requests, findings.stages[0]):
        assert (judgement.verdict, judgement.witness) == (verdict, "slope"), str(findings)
        assert words in judgement.because


def test_where_the_gpu_has_work_all_along_no_idle_time_is_claimed():
    """Launching takes nine tenths of the GPU's time: a tenth is left to gain from the GPU, and nothing on the host."""
    (request,) = with_a_varying_host(100, 90).requests
    assert request.idle_share < 0.05
    assert request.gain_share == pytest.approx(0.12, abs=0.05)
    assert sum(cause.share for cause in request.idle) == pytest.approx(request.idle_share, abs=0.01)


def test_the_answer_says_how_busy_the_gpu_was():
    """Where it was asked, with the interval; nothing of it where nobody asked."""
    machine = machine_after(WORKLOADS["taking turns"])
    words = "The GPU had work, queued or running, for "
    (answer,) = judge(recording(*machine.asked())).answers
    assert any(line.startswith(words) and line.endswith("%).") for line in answer.more)
    (answer,) = judge(machine.recording()).answers
    assert not any(words in line for line in answer.more)


def host_work_and(stage):
    """Return the verdict on requests that work on the host, are in a stage, and wait for the rest at the end."""
    machine = Machine()
    for _ in range(60):
        with machine.stage("request"):
            with machine.stage("prep"):
                machine.work(2000)
            with machine.stage("generate"):
                stage(machine)
            fetch(machine)
    (request,) = judge(recording(*machine.asked(every=100))).requests
    return request


def test_a_stage_that_keeps_the_gpu_busy_and_is_never_ahead_may_wait_inside():
    """Answers say that it has work, and not whether the host launches just as fast or waits: no guess is made."""

    def launch_and_wait(machine):
        for _ in range(20):
            machine.launch(300)
        machine.wait()

    request = host_work_and(launch_and_wait)
    assert (request.verdict, request.assumes) == ("unknown", None)
    assert "the host either works or waits for that" in request.because


def test_what_is_taken_for_granted_is_of_the_stage_that_may_wait():
    """Not of that in which the GPU has nothing to do."""

    def step(machine):
        for _ in range(20):
            machine.launch(60)
            machine.wait()
            machine.work(40)

    request = host_work_and(step)
    assert (request.verdict, request.witness) == ("cpu-bound", "answers")
    assert request.assumes == "that `generate` does not wait for the GPU inside"
    assert request.next_steps[0].startswith("Begin with `prep`")


def test_a_busy_share_is_said_to_be_within_requests_where_the_time_between_them_counts():
    """Else a GPU that has nothing to do for most of the time seems to have work all along."""
    machine = Machine()
    WORKLOADS["slow consumer"].run(machine)
    (answer,) = judge(recording(*machine.asked())).answers
    assert "Within a request the GPU had work, queued or running, for 100% of the time" in str(answer)


def test_an_answer_in_words_does_not_contradict_its_verdict():
    """Where answers are too few to decide, and events do, the page does not say that the GPU was as busy as that."""
    machine = machine_after(WORKLOADS["heavy preprocess"])
    for every in (500.0, 40_000.0):
        findings = judge(recording(*machine.asked(every=every)))
        (request,), (answer,) = findings.requests, findings.answers
        assert ("The GPU had work" in str(answer)) is (request.witness == "answers")


def test_the_gain_is_what_the_simulation_saves_without_the_bottleneck():
    """Without the host's work a request would be shorter by what is said, and by no more: nothing else ran then."""
    (request,) = judged("heavy preprocess").requests
    without = judge(machine_after(Workload(each(lambda m: (infer(m, 50, 60), fetch(m))), "", {})).recording())
    saved_ms = request.duration_ms - without.requests[0].duration_ms
    assert request.gain_ms == pytest.approx(saved_ms, rel=0.02)


def test_the_gain_from_overlap_is_the_shorter_of_the_two_idle_times():
    """Host and GPU that take turns can save no more than either of them waits."""
    for name in ("pageable copy", "item in a loop", "taking turns"):
        (request,) = judged(name).requests
        assert request.gain_share == pytest.approx(min(request.wait_share, request.idle_share), abs=0.01)
    assert request.gain_ms == pytest.approx(request.gain_share * request.duration_ms, rel=0.05)


def test_a_wait_names_the_stage_whose_work_it_is_for():
    """The time of a stage that only waits is that of the stage that launched."""
    (waiting,) = (stage for stage in judged("large gemm").stages if stage.name == "fetch")
    assert waiting.waits_for == "infer"
    assert waiting.next_steps[0] == "Begin with `infer`, which has the largest share in it."


@pytest.mark.parametrize(
    ("name", "cause", "stage"),
    [
        ("heavy preprocess", "host not ready", "prep"),
        ("taking turns", "host not ready", "prep"),
        ("pageable copy", "waiting for a copy", "h2d"),
        ("large result, known size", "waiting for a copy", "d2h"),
        ("slow consumer", "between requests", None),
        ("item in a loop", "host not ready", "request"),
        ("item in a loop, one stage", "unclear", "generate"),
    ],
)
def test_the_largest_cause_of_idleness_is_the_one_that_was_built_in(name, cause, stage):
    """Where the GPU had nothing to do, it is told why, and in which stage the host was."""
    first = judged(name).requests[0].idle[0]
    assert (first.cause, first.stage) == (cause, stage)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("pageable copy", ("pinned memory", "non_blocking=True")),
        ("item in a loop", ("`.item()`", "wait once")),
        ("taking turns", ("double buffering",)),
        ("slow consumer", ("between requests", "another thread")),
        ("large gemm, wait inside", ("a stage of its own", "gpuscope profile")),
    ],
)
def test_the_next_steps_fit_the_bottleneck(name, words):
    """What is to be tried removes what was built in, or would tell what it is."""
    steps = " ".join(judged(name).requests[0].next_steps)
    assert all(word in steps for word in words)


def test_irregular_gaps_between_requests_are_no_bottleneck():
    """A server that waits for its clients is judged by its requests; the gaps are listed all the same."""
    (request,) = judged("few requests").requests
    between = next(cause for cause in request.idle if cause.cause == "between requests")
    assert between.share > 0.5
    assert request.verdict == "gpu-bound"


def test_too_few_calls_are_not_judged():
    """Nine requests besides the warm-up are one short."""
    machine = machine_after(WORKLOADS["large gemm"])
    assert judge(recording(*machine.roots[:12])).requests[0].because == (
        "9 calls besides warm-up and cold ones; a verdict needs at least 10."
    )
    assert judge(recording(*machine.roots[:13])).requests[0].verdict == "gpu-bound"


def test_warm_up_is_never_judged():
    """Requests that are warm-up, or have a warm-up call inside, do not enter any figure."""
    machine = machine_after(WORKLOADS["large gemm"])
    slow = [replace(root.shifted(-1e9), end=root.end - 1e9 + 5e8) for root in machine.roots[:3]]
    expected = judge(machine.recording()).requests[0]
    assert judge(recording(*slow, *machine.roots)).requests[0].duration_ms == expected.duration_ms
    late = replace(
        machine.roots[-1], inside=[replace(stage, flags=RowFlag.WARMUP) for stage in machine.roots[-1].inside]
    )
    assert judge(recording(*machine.roots[:-1], late)).requests[0].calls == expected.calls - 1


def test_warm_up_requests_do_not_leak_into_the_stages_inside_them():
    """A stage that runs fifty times in each is called a warm-up call three times, and is slow for three requests."""
    machine = Machine()
    for number in range(20):
        with machine.stage("request"):
            for _ in range(50):
                with machine.stage("decode"):
                    machine.work(9000 if number < 3 else 100)
                    machine.launch(60)
                with machine.stage("item"):
                    machine.wait()
    findings = judge(machine.recording())
    decode = next(stage for stage in findings.stages if stage.name == "decode")
    assert (decode.calls, decode.warmup_calls) == (17 * 50, 3 * 50)
    assert decode.duration_ms == pytest.approx(0.172, abs=0.01)
    assert decode.gain_ms <= 50 * decode.duration_ms


def test_the_stage_to_begin_with_is_the_one_that_takes_long():
    """Not the one that launched last before the host waited."""
    machine = Machine()
    for _ in range(20):
        with machine.stage("request"):
            for name, kernels, duration in (("pre", 1, 300), ("main", 30, 600), ("post", 1, 50)):
                with machine.stage(name):
                    for _ in range(kernels):
                        machine.launch(duration)
            fetch(machine)
    findings = judge(machine.recording())
    for judgement in (findings.requests[0], findings.stages[-1]):
        assert judgement.waits_for == "main"
        assert judgement.next_steps[0] == "Begin with `main`, which has the largest share in it."


def test_a_request_on_two_streams_gains_no_less_than_the_stages_on_them():
    """The host waits for both, in a stage whose own stream has nothing to do, and nearly all of the time is theirs."""
    findings = judged("two streams, host waits")
    (request,) = findings.requests
    assert (request.waits_for, request.gain_share) == ("left", pytest.approx(0.99, abs=0.01))
    synchronize = findings.stages[-1]
    assert synchronize.waits_for in ("left", "right")
    assert synchronize.wait_share == pytest.approx(1, abs=0.01)
    assert all(stage.gain_share <= request.gain_share for stage in findings.stages)


def test_advice_is_given_once():
    """The same long sentences under each stage hide what is different."""
    lines = str(judged("heavy preprocess")).splitlines()
    steps = [line.strip() for line in lines[lines.index("") :] if line.strip().startswith("- ")]
    assert steps
    assert len(steps) == len(set(steps))


def test_late_cold_requests_are_listed_and_not_averaged_in():
    """One request that compiles for half a second leaves the figures as they were."""
    machine = Machine()
    WORKLOADS["large gemm"].run(machine)
    with machine.stage("request"):
        with machine.stage("infer", batch_size=9):
            machine.work(500_000)
            machine.launch(5000)
        fetch(machine)
    WORKLOADS["large gemm"].run(machine)
    findings = judge(machine.recording())
    assert [call.because for call in findings.cold] == ["first call with batch_size=9"]
    assert (findings.requests[0].cold_calls, findings.requests[0].verdict) == (1, "gpu-bound")
    assert findings.requests[0].idle_share == pytest.approx(judged("large gemm").requests[0].idle_share, abs=0.01)


@pytest.mark.parametrize(
    ("losses", "verdict"),
    [
        (Losses(dropped={"queue_full": 1}), "gpu-bound"),
        (Losses(dropped={"queue_full": 50}), "unknown"),
        (Losses(lost={"export_failed": 50}), "unknown"),
        (Losses(orphans=50), "unknown"),
    ],
)
def test_where_stages_are_missing_nothing_is_certain(losses, verdict):
    """More than one stage in a hundred that never reached the files makes every verdict unknown, and is told."""
    findings = judge(machine_after(WORKLOADS["large gemm"]).recording(losses))
    assert {each.verdict for each in (*findings.requests, *findings.stages)} == {verdict}
    assert findings.notes


@pytest.mark.parametrize(
    ("change", "because"),
    [
        ({"flags": int(RowFlag.CAPTURED), "gpu": None}, "ran while a CUDA graph was captured"),
        ({"flags": int(RowFlag.GIVEN_UP), "gpu": None}, "was given up before its GPU work ended"),
        ({"flags": int(RowFlag.CLAMPED)}, "has GPU times that cannot be placed: they lie before the launch"),
        ({"flags": int(RowFlag.CLAMPED | RowFlag.UNPLACED)}, "has GPU times that cannot be placed: the GPU's clock"),
        ({"gpu": None}, "has no GPU times"),
    ],
)
def test_stages_without_gpu_times_hide_work(change, because):
    """A stage without reliable GPU times is unknown, and so is a request most of which is such a stage."""
    roots = machine_after(WORKLOADS["heavy preprocess"]).roots
    roots = [replace(root, inside=[replace(root.inside[0], **change), *root.inside[1:]]) for root in roots]
    findings = judge(recording(*roots))
    hidden = [verdict for verdict in (*findings.requests, *findings.stages) if verdict.name in ("request", "prep")]
    assert [verdict.verdict for verdict in hidden] == ["unknown", "unknown"]
    assert all(verdict.because.startswith("GPU work may be hidden: `prep` " + because) for verdict in hidden)
    assert {stage.verdict for stage in findings.stages if stage.name != "prep"} == {"gpu-bound"}


def test_a_gpu_is_not_said_to_be_busy_for_a_part_where_most_of_its_work_may_be_hidden():
    """Where a request has no GPU times of its own, answers of one stage in it are of that stage alone."""
    infer = Stage("infer", 300, 700, gpu=(303, 703), samples=10, had_work=4)
    findings = judge(recording(*(Stage("request", 0, 1000, inside=[infer]).shifted(2000 * n) for n in range(60))))
    (request,), (stage,) = findings.requests, findings.stages
    assert (request.verdict, request.busy_share, request.busy_range, request.answers) == ("unknown", None, None, 0)
    assert stage.busy_share == pytest.approx(0.4, abs=0.01)


def test_where_gpu_work_may_be_hidden_no_idleness_is_claimed():
    """Of a stage that was given up it is not known what the GPU did in it."""
    lost = Stage("a", 100, 900, gpu=(103, 800), flags=RowFlag.GIVEN_UP)
    whole = recording(*(Stage("request", 0, 1000, gpu=(3, 1003), inside=[lost]).shifted(2000 * n) for n in range(40)))
    assert [cause.cause for cause in judge(whole).requests[0].idle] == ["between requests"]


def test_time_of_which_nothing_is_certain_is_not_said_to_be_without_work():
    """The host may have waited for work in it."""
    text = str(judged("large gemm, wait inside"))
    assert "GPU perhaps without work:" in text
    assert "GPU without work" not in text


def test_copies_that_the_host_waits_for_are_no_work_that_answers_are_about():
    """Else the GPU seems to have had nothing to do while it copied."""
    copy = Stage("h2d", 100, 900, gpu=(103, 903), samples=8, had_work=8, attributes={"bytes": 8_000_000})
    root = Stage("request", 0, 1000, gpu=(3, 1003), samples=2, inside=[copy])
    findings = judge(recording(*(root.shifted(1010 * number) for number in range(60))))
    told = "had work besides the copies that the host waits for, queued or running, for 0% of the time"
    assert findings.requests[0].verdict == "pipeline-bound"
    assert told in findings.requests[0].because
    assert told in str(findings.answers[0])


def test_one_stage_in_two_places_has_a_slope_in_each():
    """Though it is called as often there."""

    def request(machine, number):
        slower = 1 + (number * 7919 % 11) / 110
        for around, launch, kernel in (("prefill", 90, 100), ("decode", 100, 30)):
            with machine.stage(around), machine.stage("layer"):
                for _ in range(100):
                    machine.launch(kernel, cost=launch * slower)
                machine.launch(900 if around == "decode" else 100)
            fetch(machine)

    machine = Machine()
    for number in range(REQUESTS):
        with machine.stage("request"):
            request(machine, number)
    by_name = {stage.name: stage for stage in judge(machine.recording()).stages}
    assert (by_name["prefill"].witness, by_name["prefill"].verdict) == ("slope", "gpu-bound")
    assert (by_name["decode"].witness, by_name["decode"].verdict) == ("slope", "cpu-bound")


def test_requests_on_several_gpus_and_with_concurrent_stages_are_unknown():
    """Neither is judged, and each says why."""
    one = Stage("a", 10, 20, gpu=(13, 400))
    two_gpus = Stage("request", 0, 900, gpu=(3, 903), inside=[one, Stage("b", 30, 800, gpu=(33, 803), device=1)])
    tasks = Stage("request", 0, 900, gpu=(3, 903), inside=[one, Stage("b", 15, 800, gpu=(33, 803))])
    for root, because in ((two_gpus, "several GPUs"), (tasks, "at the same time")):
        (request,) = judge(recording(*(root.shifted(1000 * number) for number in range(20)))).requests
        assert request.verdict == "unknown"
        assert because in request.because


@pytest.mark.parametrize(("had_work", "verdict"), [(20, "gpu-bound"), (6, "unknown"), (2, "cpu-bound")])
def test_answers_tell_where_requests_cannot_be_cut(had_work, verdict):
    """Of tasks side by side, and of several GPUs, events say little; the host may always have waited."""
    asked = {"samples": 20, "had_work": had_work}
    one = Stage("a", 10, 20, gpu=(13, 400))
    two_gpus = [one, Stage("b", 30, 800, gpu=(33, 803), device=1)]
    tasks = [one, Stage("b", 15, 800, gpu=(33, 803))]
    for inside in (two_gpus, tasks):
        root = Stage("request", 0, 900, gpu=(3, 903), inside=inside, **asked)
        root = replace(root, inside=[replace(stage, **asked) for stage in inside])
        (request,) = judge(recording(*(root.shifted(1000 * number) for number in range(60)))).requests
        if verdict == "gpu-bound" or inside is tasks:
            assert (request.verdict, request.witness) == (verdict, "answers")
            assert request.assumes is None
        assert 0 <= (request.gain_share or 0.0) <= 1


def test_calls_that_differ_are_not_given_one_verdict():
    """Half the requests GPU-bound and half CPU-bound: the average is true of none."""
    machine = Machine()
    for number in range(60):
        with machine.stage("request"):
            with machine.stage("prep"):
                machine.work(100 if number % 2 else 9000)
            infer(machine, 1, 5000 if number % 2 else 60)
            fetch(machine)
    (request,) = judge(machine.recording()).requests
    assert request.verdict == "unknown"
    assert request.because.startswith("Its calls differ")


def test_a_stage_of_some_microseconds_is_not_judged():
    """It would be its two events that are judged."""
    findings = judge(machine_after(WORKLOADS["tiny kernels"]).recording())
    (short,) = (stage for stage in findings.stages if stage.name == "fetch")
    assert short.because == "It is shorter than 0.03 ms, so its own two events are too much of what is measured."


def test_cost_is_per_call_for_launching_and_per_item_for_gpu_work():
    """A stage that launches costs the same for any batch; GPU work grows with it; without sizes there is no fit."""
    machine, sizes = Machine(), np.random.default_rng(0).choice([2, 4, 8, 16], 120).tolist()
    for size in sizes:
        with machine.stage("request", batch_size=size):
            infer(machine, 300, 2)
            with machine.stage("compute"):
                machine.launch(500 + 400 * size)
            fetch(machine)
    stages = {stage.name: stage for stage in judge(machine.recording()).stages}
    assert stages["infer"].cost.fixed_share > 0.95
    assert stages["infer"].next_steps[0].startswith("Most of its cost is per call")
    assert stages["compute"].cost.per_item_ms == pytest.approx(0.4, rel=0.05)
    assert stages["compute"].cost.size == "batch_size"
    assert judged("large gemm").stages[0].no_cost.startswith("no attribute says how much")


def test_stages_are_judged_within_their_kind_of_request():
    """A stage of one name in two kinds of request, and outermost itself, is three things."""
    machine = Machine()
    for _ in range(20):
        with machine.stage("large"):
            infer(machine, 1, 5000)
            fetch(machine)
        with machine.stage("small"):
            infer(machine, 300, 2)
            fetch(machine)
        infer(machine, 1, 100)
        machine.wait()
    findings = judge(machine.recording())
    assert {request.name for request in findings.requests} == {"large", "small", "infer"}
    assert {stage.root: stage.verdict for stage in findings.stages if stage.name == "infer"} == {
        "large": "gpu-bound",
        "small": "cpu-bound",
    }


def test_of_a_gpu_without_times_no_idleness_is_claimed():
    """Where nothing is known of the GPU, it is not said to have had nothing to do."""
    everything = machine_after(WORKLOADS["taking turns"]).recording()
    nothing = np.zeros_like(everything.gpu_start_ns)
    untimed = replace(everything, stream=np.full_like(everything.stream, -1), gpu_start_ns=nothing, gpu_end_ns=nothing)
    assert judge(everything).requests[0].idle
    assert [request.idle for request in judge(untimed).requests] == [()]
    assert "GPU without work" not in str(judge(untimed))


def test_a_part_that_few_slow_requests_make_is_told_with_its_mean():
    """Its median is next to nothing, which contradicts its share of all the time."""
    slow = Stage("request", 0, 301_000, inside=[Stage("decode", 0, 1000)])
    quick = Stage("request", 0, 1050, inside=[Stage("decode", 0, 1000)])
    requests = [(slow if number % 4 == 0 else quick).shifted(400_000 * number) for number in range(40)]
    said = str(judge(recording(*requests)).answers[0])
    assert "Most of it is in no stage inside: 75.0 ms on average (99%), and 50.0 µs in the median request." in said


def test_kept_requests_are_told_first_and_once():
    """What `keep` left out is not missing, and no figure is read before it is known which requests these are."""
    findings = judge(recording(Stage("request", 0, 1000), losses=Losses(dropped={"not_kept": 1200, "queue_full": 1})))
    lines = str(findings).splitlines()
    assert lines[0].startswith("These are the requests that `keep` has kept, most of them slow;")
    assert "of 1,200 stages, are not here." in lines[0]
    assert "not_kept" not in str(findings)
    assert "Stages dropped: 1 queue_full." in lines


def test_who_waits_for_a_compilation_is_told_to_compile_before():
    """It has no parts to look into."""
    compiles = Stage("torch.compile", 10, 990)
    request = Stage("request", 0, 1000, inside=[Stage("infer", 5, 995, inside=[compiles])])
    answer = judge(recording(*(request.shifted(1100 * number) for number in range(20)))).answers[0]
    assert answer.try_first.startswith("Run each shape once before the first request")
