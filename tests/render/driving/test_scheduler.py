"""The scheduler is pure, so a whole run is an ordinary function call."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import replace

import pytest

from magi_ray.errors import FailureClass, StoreUnwritable, WeightsError, WorkerLost
from magi_ray.events import (
    CancelAsked,
    Event,
    Inspected,
    NodesSeen,
    PauseAsked,
    RowInventory,
    StageCommitted,
    Task,
    TaskDone,
    TaskFailed,
    TaskKind,
    TaskStopped,
    WorkerGone,
    WorkerPlaced,
    WorkerReady,
)
from magi_ray.render.driving.scheduler import (
    BUDGETS,
    MAX_FAILED_STARTS,
    ONE_OF_EACH,
    ROWS_FAILED_ON_BAD_NODE,
    Abandon,
    Command,
    EndRun,
    Inspect,
    RowFailed,
    RunState,
    RunTask,
    Scheduler,
    StartWorker,
    StopWorker,
)

WINDOW = 4


def row(job_id: str, *, priority: int = 0, num_chunks: int = 2, **held: object) -> RowInventory:
    stages = num_chunks + WINDOW - 1
    return RowInventory(job_id=job_id, priority=priority, num_stages=stages, num_chunks=num_chunks, **held)  # type: ignore[arg-type]


def stages_of(task: Task, of: RowInventory) -> Iterable[StageCommitted]:
    for stage in range(task.index, of.num_stages):
        chunk = stage - WINDOW + 1
        yield StageCommitted(job_id=of.job_id, stage=stage, chunk=chunk if chunk >= 0 else None)


def hear(scheduler: Scheduler, *events: Event) -> list[Command]:
    """What the scheduler decides; its state is checked after each event."""
    commands = []
    for event in events:
        commands += scheduler.handle(event)
        scheduler.validate()
    return commands


def ready(worker: str, *, node: str = "") -> list[Event]:
    return [WorkerPlaced(worker=worker, node=node), WorkerReady(worker=worker)]


def begun(rows: list[RowInventory], *kinds: TaskKind, **options: object) -> tuple[Scheduler, list[Command]]:
    """A scheduler, and what it decided once the first workers of ``kinds`` (default: of all) were ready."""
    scheduler = Scheduler(rows, **options)  # type: ignore[arg-type]
    return scheduler, scheduler.start() + begin(scheduler, *kinds)


def begin(scheduler: Scheduler, *kinds: TaskKind) -> list[Command]:
    """Make the workers that were started ready, in the order in which kinds get to work."""
    commands: list[Command] = []
    for kind in kinds or TaskKind:
        if f"{kind}-0" in scheduler._workers:
            commands += hear(scheduler, *ready(f"{kind}-0"))
    return commands


def done(run: RunTask) -> TaskDone:
    return TaskDone(worker=run.worker, task=run.task, attempt=run.attempt)


def failed(run: RunTask, failure: FailureClass = FailureClass.CODE) -> TaskFailed:
    return TaskFailed(worker=run.worker, task=run.task, attempt=run.attempt, failure=failure, message="no")


def gone(worker: str, failure: FailureClass = FailureClass.INFRASTRUCTURE, **more: object) -> WorkerGone:
    return WorkerGone(worker=worker, failure=failure, message="no", **more)  # type: ignore[arg-type]


def runs(commands: list[Command], kind: TaskKind | None = None) -> list[RunTask]:
    return [c for c in commands if isinstance(c, RunTask) and kind in (None, c.task.kind)]


def tasks(commands: list[Command], kind: TaskKind | None = None) -> list[Task]:
    return [run.task for run in runs(commands, kind)]


def starts(commands: list[Command]) -> list[StartWorker]:
    return [c for c in commands if isinstance(c, StartWorker)]


def play(
    scheduler: Scheduler,
    rows: list[RowInventory],
    kinds: Iterable[TaskKind] = TaskKind,
    fail: Callable[[RunTask], Event | None] = lambda _: None,
) -> list[Command]:
    """Carry out every command at once and in order, but start workers of ``kinds`` only; ``fail`` may answer a task
    with something else than success."""
    held, by_id = {one.job_id: one for one in rows}, {one.job_id: one for one in rows}
    commands = scheduler.start()
    todo, waiting = deque(commands), deque[Event]()
    while todo or waiting:
        if not todo:
            event = waiting.popleft()
            note(held, event)
            todo.extend(decided := hear(scheduler, event))
            commands += decided
            continue
        match todo.popleft():
            case StartWorker(worker=worker, kind=kind) if kind in kinds:
                waiting.extend(ready(worker))
            case Inspect(job_id=job_id):
                waiting.append(Inspected(row=held[job_id]))
            case RunTask(task=task) as run:
                if (failure := fail(run)) is not None:
                    waiting.append(failure)
                    continue
                if task.kind is TaskKind.DENOISE:
                    waiting.extend(stages_of(task, by_id[task.job_id]))
                waiting.append(done(run))
            case _:
                pass
    return commands


def note(held: dict[str, RowInventory], event: Event) -> None:
    """What the store holds after ``event``."""
    match event:
        case StageCommitted(job_id=job_id, stage=stage):
            held[job_id] = replace(held[job_id], stages_done=stage + 1)
        case TaskDone(task=Task(kind=TaskKind.EMBED, job_id=job_id)):
            held[job_id] = replace(held[job_id], embedded=True)
        case TaskDone(task=Task(kind=TaskKind.DECODE, job_id=job_id, index=chunk)):
            held[job_id] = replace(held[job_id], segments_done=held[job_id].segments_done | {chunk})
        case _:
            pass


def test_a_row_is_embedded_denoised_decoded_and_finished() -> None:
    rows = [row("a")]
    scheduler = Scheduler(rows)
    commands = play(scheduler, rows)
    assert [(task.kind, task.index) for task in tasks(commands)] == [
        (TaskKind.EMBED, 0), (TaskKind.DENOISE, 0), (TaskKind.DECODE, 0), (TaskKind.DECODE, 1), (TaskKind.FINISH, 0),
    ]  # fmt: skip
    assert scheduler.finished


def test_rows_are_taken_by_priority_and_then_in_the_manifests_order() -> None:
    rows = [row("first"), row("urgent", priority=5), row("second")]
    commands = play(Scheduler(rows), rows)
    assert [task.job_id for task in tasks(commands, TaskKind.DENOISE)] == ["urgent", "first", "second"]


def test_denoising_never_waits_for_decoding() -> None:
    rows = [row("a"), row("b")]
    scheduler = Scheduler(rows)
    commands = play(scheduler, rows, [TaskKind.EMBED, TaskKind.DENOISE])
    assert [task.job_id for task in tasks(commands, TaskKind.DENOISE)] == ["a", "b"]
    assert not scheduler.finished
    late = hear(scheduler, *ready("decode-0"))
    for _ in range(4):
        [run] = runs(late, TaskKind.DECODE)
        late = hear(scheduler, done(run))
    assert tasks(late, TaskKind.DECODE) == []
    for job_id in "ab":
        [finish] = runs(hear(scheduler, *ready("finish-0")) if job_id == "a" else late, TaskKind.FINISH)
        assert finish.task.job_id == job_id
        late = hear(scheduler, done(finish))
    assert scheduler.finished


def test_a_chunk_is_decoded_while_its_video_is_still_denoised() -> None:
    rows = [row("a", num_chunks=3)]
    scheduler, commands = begun(rows)
    [denoise] = runs(hear(scheduler, done(*runs(commands))))
    hear(scheduler, *ready("decode-0"))
    committed = list(stages_of(denoise.task, rows[0]))
    assert tasks(hear(scheduler, *committed[:3])) == []
    assert tasks(hear(scheduler, committed[3])) == [Task(kind=TaskKind.DECODE, job_id="a", index=0)]


def test_what_the_store_holds_is_not_asked_for_again() -> None:
    rows = [
        row("published", stages_done=5, published=True),
        row("half", embedded=True, stages_done=4, segments_done=frozenset()),
        row("decoded", embedded=True, stages_done=5, segments_done=frozenset({0, 1})),
    ]
    commands = play(Scheduler(rows), rows)
    asked = {(task.kind, task.job_id, task.index) for task in tasks(commands)}
    assert asked == {
        (TaskKind.DENOISE, "half", 4),
        (TaskKind.DECODE, "half", 0),
        (TaskKind.DECODE, "half", 1),
        (TaskKind.FINISH, "half", 0),
        (TaskKind.FINISH, "decoded", 0),
    }


def test_after_a_workers_death_denoising_goes_on_behind_the_last_commit() -> None:
    rows = [row("a", embedded=True)]
    scheduler, commands = begun(rows)
    [denoise] = runs(commands)
    hear(scheduler, *list(stages_of(denoise.task, rows[0]))[:3])
    assert StartWorker(worker="denoise-1", kind=TaskKind.DENOISE) in hear(
        scheduler, gone("denoise-0", FailureClass.PREEMPTED)
    )
    again = hear(scheduler, *ready("denoise-1"))
    assert tasks(again) == [Task(kind=TaskKind.DENOISE, job_id="a", index=3)]


@pytest.mark.parametrize("failure", [f for f in FailureClass if BUDGETS[f] is not None])
def test_a_row_fails_once_its_class_of_failures_has_used_up_its_budget(failure: FailureClass) -> None:
    rows = [row("poisoned"), row("good")]

    def fail(run: RunTask) -> Event | None:
        poisoned = run.task.job_id == "poisoned" and run.task.kind is TaskKind.DENOISE
        return failed(run, failure) if poisoned else None

    scheduler = Scheduler(rows)
    commands = play(scheduler, rows, fail=fail)
    budget = BUDGETS[failure]
    assert budget is not None
    [row_failed] = [command for command in commands if isinstance(command, RowFailed)]
    assert (row_failed.job_id, row_failed.attempts, row_failed.failure) == ("poisoned", budget + 1, failure)
    assert [task.job_id for task in tasks(commands, TaskKind.FINISH)] == ["good"]
    assert scheduler.finished


def test_a_store_that_cannot_be_written_ends_the_run_and_charges_no_row() -> None:
    rows = [row("a", embedded=True)]
    scheduler, commands = begun(rows)
    [denoise] = runs(commands)
    heard = hear(scheduler, failed(denoise, FailureClass.UNWRITABLE))
    assert isinstance(heard[0], EndRun)
    assert isinstance(heard[0].error, StoreUnwritable)
    assert not any(isinstance(command, RowFailed) for command in heard)


def test_denoising_that_gets_further_each_time_is_never_given_up() -> None:
    rows = [row("a", num_chunks=30, embedded=True)]
    scheduler, _ = begun(rows)
    for stage in range(rows[0].num_stages - 1):
        hear(scheduler, StageCommitted(job_id="a", stage=stage, chunk=None))
        again = f"denoise-{stage + 1}"
        commands = hear(scheduler, gone(f"denoise-{stage}"))
        assert commands == [StartWorker(worker=again, kind=TaskKind.DENOISE)]
        assert tasks(hear(scheduler, *ready(again))) == [Task(kind=TaskKind.DENOISE, job_id="a", index=stage + 1)]


def test_denoising_that_fails_after_its_last_commit_has_not_failed() -> None:
    rows = [row("a", embedded=True)]
    scheduler, commands = begun(rows)
    [denoise] = runs(commands)
    hear(scheduler, *stages_of(denoise.task, rows[0]))
    # Nothing to try again, and its worker may go only now.
    assert hear(scheduler, failed(denoise, FailureClass.INPUT)) == [StopWorker(worker="denoise-0")]


def test_preemption_is_not_counted() -> None:
    rows = [row("a")]
    taken = 0

    def fail(run: RunTask) -> Event | None:
        nonlocal taken
        if run.task.kind is TaskKind.DENOISE and taken < 50:
            taken += 1
            return failed(run, FailureClass.PREEMPTED)
        return None

    scheduler = Scheduler(rows)
    commands = play(scheduler, rows, fail=fail)
    assert taken == 50
    assert not any(isinstance(command, RowFailed) for command in commands)
    assert scheduler.finished


def test_a_row_that_failed_in_decoding_is_no_longer_denoised() -> None:
    rows = [row("a", num_chunks=3, embedded=True)]
    scheduler, commands = begun(rows)
    [denoise] = runs(commands)
    hear(scheduler, *ready("decode-0"))
    [decode] = runs(hear(scheduler, *list(stages_of(denoise.task, rows[0]))[:4]))
    commands = hear(scheduler, failed(decode, FailureClass.INPUT))
    assert Abandon(worker="denoise-0", attempt=denoise.attempt) in commands
    assert not scheduler.finished  # the denoise worker has not answered yet
    hear(scheduler, TaskStopped(worker="denoise-0", task=denoise.task, attempt=denoise.attempt))
    assert scheduler.finished


def test_workers_are_stopped_once_no_row_needs_their_kind() -> None:
    rows = [row("a"), row("b")]
    commands = play(Scheduler(rows), rows)
    stopped = [command.worker for command in commands if isinstance(command, StopWorker)]
    assert sorted(stopped) == sorted(f"{kind}-0" for kind in TaskKind)
    last_embed = max(i for i, c in enumerate(commands) if isinstance(c, RunTask) and c.task.kind is TaskKind.EMBED)
    assert commands.index(StopWorker(worker="embed-0")) > last_embed


# Attempts ---------------------------------------------------------------------------------------------------------


def test_every_attempt_has_a_number_of_its_own() -> None:
    rows = [row("a"), row("b")]
    refused: set[Task] = set()

    def fail(run: RunTask) -> Event | None:
        if run.task in refused:
            return None
        refused.add(run.task)
        return failed(run, FailureClass.PREEMPTED)

    attempts = [run.attempt for run in runs(play(Scheduler(rows), rows, fail=fail))]
    assert len(attempts) == len(set(attempts)) == 2 * 10


def test_a_row_that_was_stopped_as_asked_is_not_done() -> None:
    rows = [row("a", embedded=True)]
    scheduler, commands = begun(rows)
    [denoise] = runs(commands)
    hear(scheduler, StageCommitted(job_id="a", stage=0, chunk=None))
    [again] = runs(hear(scheduler, TaskStopped(worker=denoise.worker, task=denoise.task, attempt=denoise.attempt)))
    assert again.task == Task(kind=TaskKind.DENOISE, job_id="a", index=1)
    assert again.attempt != denoise.attempt


# How many workers -------------------------------------------------------------------------------------------------


def test_workers_start_in_the_order_in_which_they_get_to_work() -> None:
    scheduler = Scheduler([row("a")], workers={**ONE_OF_EACH, TaskKind.DECODE: 2})
    assert [start.worker for start in starts(scheduler.start())] == ["embed-0", "denoise-0"]
    assert starts(hear(scheduler, *ready("embed-0"))) == []
    assert [start.worker for start in starts(hear(scheduler, *ready("denoise-0")))] == ["decode-0", "decode-1"]
    assert [start.worker for start in starts(hear(scheduler, *ready("decode-1")))] == ["finish-0"]


def test_no_worker_is_started_for_what_the_store_holds() -> None:
    rows = [row("a", stages_done=5, segments_done=frozenset({0, 1}))]
    assert [start.worker for start in starts(Scheduler(rows).start())] == ["finish-0"]
    assert Scheduler([row("a", published=True)]).start() == []


def test_a_worker_that_does_not_start_is_tried_a_few_times_and_then_the_run_is_given_up() -> None:
    scheduler, _ = begun([row("a", embedded=True)], TaskKind.EMBED)
    for number in range(MAX_FAILED_STARTS - 1):
        assert [start.worker for start in starts(hear(scheduler, gone(f"denoise-{number}")))] == [
            f"denoise-{number + 1}"
        ]
    [end] = [c for c in hear(scheduler, gone(f"denoise-{MAX_FAILED_STARTS - 1}")) if isinstance(c, EndRun)]
    assert isinstance(end.error, WorkerLost)
    assert f"{MAX_FAILED_STARTS} denoise workers failed to start" in end.error.message


def test_what_keeps_every_worker_of_a_kind_from_starting_ends_the_run_at_once() -> None:
    scheduler, _ = begun([row("a", embedded=True)], TaskKind.EMBED)
    error = WeightsError("a file is missing")
    assert EndRun(error=error) in hear(scheduler, gone("denoise-0", error=error))


def test_where_no_other_node_has_room_one_with_a_failure_is_better_than_none() -> None:
    scheduler, [first] = begun([row("a", embedded=True)], TaskKind.EMBED)
    assert isinstance(first, StartWorker)
    hear(scheduler, seen("n1", "n2"), *ready("denoise-0", node="n1"))
    commands = hear(scheduler, gone("denoise-0"))
    assert starts(commands) == [StartWorker(worker="denoise-1", kind=TaskKind.DENOISE, avoid=frozenset({"n1"}))]
    commands = hear(scheduler, gone("denoise-1", no_room=True))
    assert starts(commands) == [StartWorker(worker="denoise-2", kind=TaskKind.DENOISE)]


def test_a_state_that_contradicts_itself_is_told_with_the_last_events() -> None:
    scheduler, _ = begun([row("a", embedded=True)])
    scheduler._rows["a"].running.clear()
    with pytest.raises(AssertionError, match=r"(?s)is done for a.*The last events.*WorkerReady.*RunTask"):
        scheduler.validate()


# Pausing, cancelling, giving up -----------------------------------------------------------------------------------


def at_work(rows: list[RowInventory], **options: object) -> tuple[Scheduler, RunTask]:
    """Row 'a' is being denoised."""
    scheduler, commands = begun(rows, **options)
    commands = hear(scheduler, done(*runs(commands)))
    [denoise] = runs(commands, TaskKind.DENOISE)
    return scheduler, denoise


def test_a_paused_run_commits_the_stage_in_work_and_begins_nothing() -> None:
    scheduler, commands = begun([row("a"), row("b")])
    commands = hear(scheduler, done(*runs(commands)))
    [embed], [denoise] = runs(commands, TaskKind.EMBED), runs(commands, TaskKind.DENOISE)
    commands = hear(scheduler, PauseAsked())
    assert Abandon(worker="denoise-0", attempt=denoise.attempt, to_stage_end=True) in commands
    assert not scheduler.finished
    assert tasks(hear(scheduler, StageCommitted(job_id="a", stage=0, chunk=None))) == []
    hear(scheduler, done(embed))
    last = hear(scheduler, TaskStopped(worker="denoise-0", task=denoise.task, attempt=denoise.attempt))
    assert tasks(last) == []
    assert StopWorker(worker="denoise-0") in last
    assert (scheduler.finished, scheduler.state) == (True, RunState.PAUSED)


def test_a_worker_lost_while_pausing_is_not_replaced() -> None:
    scheduler, _ = at_work([row("a")])
    hear(scheduler, PauseAsked())
    assert starts(hear(scheduler, gone("denoise-0"))) == []
    assert scheduler.finished


def test_a_cancelled_run_is_at_its_end_at_once() -> None:
    scheduler, _ = at_work([row("a")])
    assert tasks(hear(scheduler, CancelAsked())) == []
    assert (scheduler.finished, scheduler.state) == (True, RunState.CANCELLED)


def test_a_run_whose_last_row_ends_while_it_pauses_is_done() -> None:
    scheduler, commands = begun([row("a", stages_done=5, segments_done=frozenset({0, 1}))])
    [run] = runs(commands)
    hear(scheduler, PauseAsked(), done(run))
    assert (scheduler.finished, scheduler.state) == (True, RunState.DONE)


def test_a_run_in_which_too_many_rows_fail_is_stopped() -> None:
    rows = [row(name) for name in "abcdef"]
    scheduler = Scheduler(rows, max_failed_rows=2)
    commands = play(scheduler, rows, fail=lambda run: failed(run, FailureClass.INPUT))
    assert [c.job_id for c in commands if isinstance(c, RowFailed)] == ["a", "b", "c"]
    assert (scheduler.finished, scheduler.state) == (True, RunState.BROKEN)


def test_a_row_that_failed_before_is_left_alone_and_counts_for_nothing() -> None:
    rows = [row("a", failed=True), row("b")]
    scheduler = Scheduler(rows, max_failed_rows=0)
    assert {task.job_id for task in tasks(play(scheduler, rows))} == {"b"}
    assert scheduler.state is RunState.FAILED


# Nodes --------------------------------------------------------------------------------------------------------------


def seen(*nodes: str, kind: TaskKind = TaskKind.DENOISE) -> NodesSeen:
    return NodesSeen(kind=kind, nodes=frozenset(nodes))


def on_two_nodes(rows: list[RowInventory]) -> tuple[Scheduler, RunTask]:
    """The first row is being denoised on n1; there is n2, too."""
    scheduler = Scheduler(rows)
    scheduler.start()
    [run] = runs(hear(scheduler, seen("n1", "n2"), *ready("denoise-0", node="n1")))
    return scheduler, run


def test_a_row_is_not_tried_twice_on_one_node() -> None:
    scheduler, run = on_two_nodes([row("a", embedded=True)])
    assert hear(scheduler, failed(run)) == [
        StopWorker(worker="denoise-0"),
        StartWorker(worker="denoise-1", kind=TaskKind.DENOISE, avoid=frozenset({"n1"})),
    ]
    [again] = runs(hear(scheduler, *ready("denoise-1", node="n2")))
    assert again.task == run.task


def test_meanwhile_the_node_takes_other_rows() -> None:
    scheduler, run = on_two_nodes([row("a", embedded=True), row("b", embedded=True)])
    assert [task.job_id for task in tasks(hear(scheduler, failed(run)))] == ["b"]


def test_a_lost_worker_is_replaced_on_another_node() -> None:
    scheduler, _ = on_two_nodes([row("a", embedded=True)])
    commands = hear(scheduler, gone("denoise-0"))
    assert commands == [StartWorker(worker="denoise-1", kind=TaskKind.DENOISE, avoid=frozenset({"n1"}))]


def test_where_there_is_one_node_only_it_gets_another_chance() -> None:
    scheduler, run = on_two_nodes([row("a", embedded=True)])
    hear(scheduler, seen("n1"))
    assert tasks(hear(scheduler, failed(run))) == [run.task]


@pytest.mark.parametrize("failure", [FailureClass.PREEMPTED, FailureClass.STORE])
def test_what_is_not_the_nodes_fault_is_not_held_against_it(failure: FailureClass) -> None:
    scheduler, _ = on_two_nodes([row("a", embedded=True)])
    commands = hear(scheduler, gone("denoise-0", failure))
    assert StartWorker(worker="denoise-1", kind=TaskKind.DENOISE) in commands


def test_a_node_on_which_several_rows_failed_is_left_alone() -> None:
    names = [f"r{number}" for number in range(ROWS_FAILED_ON_BAD_NODE)]
    scheduler, run = on_two_nodes([row(name, embedded=True) for name in [*names, "good"]])
    for _ in names:
        commands = hear(scheduler, failed(run))
        run = next(iter(runs(commands)), run)
    assert commands == [
        StopWorker(worker="denoise-0"),
        StartWorker(worker="denoise-1", kind=TaskKind.DENOISE, avoid=frozenset({"n1"})),
    ]
    # And once the other node is gone, it is better than none.
    hear(scheduler, seen("n1"))
    assert tasks(hear(scheduler, *ready("denoise-1", node="n1")))


# What the store turned out not to hold --------------------------------------------------------------------------------


def test_a_chunk_that_turns_out_damaged_is_rendered_again_once_its_video_is_denoised() -> None:
    rows = [row("a", embedded=True, num_chunks=4)]
    scheduler, commands = begun(rows)
    [denoise] = runs(commands)
    hear(scheduler, *ready("decode-0"))
    committed = list(stages_of(denoise.task, rows[0]))
    decode = runs(hear(scheduler, *committed[:5]), TaskKind.DECODE)[0]
    assert Inspect(job_id="a") in hear(scheduler, failed(decode, FailureClass.STORE))
    found = replace(rows[0], stages_done=3)
    assert tasks(hear(scheduler, Inspected(row=found)), TaskKind.DENOISE) == []
    hear(scheduler, *committed[5:])
    [again] = tasks(hear(scheduler, done(denoise)), TaskKind.DENOISE)
    assert again.index == 3


def test_a_segment_that_turns_out_damaged_is_decoded_again_before_the_video_is_joined() -> None:
    rows = [row("a", stages_done=5, segments_done=frozenset({0, 1}))]
    scheduler, commands = begun(rows)
    [finish] = runs(commands)
    assert hear(scheduler, failed(finish, FailureClass.STORE)) == [Inspect(job_id="a")]
    hear(scheduler, Inspected(row=replace(rows[0], segments_done=frozenset({0}))))
    [decode] = runs(hear(scheduler, *ready("decode-0")))
    assert decode.task == Task(kind=TaskKind.DECODE, job_id="a", index=1)
    assert tasks(hear(scheduler, done(decode))) == [finish.task]


def test_workers_that_were_stopped_are_started_again_when_their_work_turns_out_lost() -> None:
    rows = [row("a", embedded=True, stages_done=5, segments_done=frozenset({0, 1}))]
    scheduler, commands = begun(rows)
    [finish] = runs(commands)
    hear(scheduler, failed(finish, FailureClass.STORE))
    commands = hear(scheduler, Inspected(row=replace(rows[0], stages_done=3, segments_done=frozenset())))
    assert [start.kind for start in starts(commands)] == [TaskKind.DENOISE]
    commands = hear(scheduler, *ready("denoise-0"))
    assert [start.kind for start in starts(commands)] == [TaskKind.DECODE]
