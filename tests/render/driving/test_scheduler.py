"""The scheduler is pure, so a whole run is an ordinary function call."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import replace

import pytest

from magi_ray.errors import FailureClass
from magi_ray.events import StageCommitted, Task, TaskKind
from magi_ray.render.driving.scheduler import (
    BUDGETS,
    ROWS_FAILED_ON_BAD_NODE,
    Abandon,
    CancelAsked,
    Command,
    Event,
    Inspect,
    Inspected,
    NodesSeen,
    PauseAsked,
    Release,
    Replace,
    RowFailed,
    RowInventory,
    RunState,
    RunTask,
    Scheduler,
    TaskDone,
    TaskFailed,
    WorkerGone,
    WorkerReady,
)

WINDOW = 4


def row(job_id: str, *, priority: int = 0, num_chunks: int = 2, **held: object) -> RowInventory:
    stages = num_chunks + WINDOW - 1
    return RowInventory(job_id=job_id, priority=priority, num_stages=stages, num_chunks=num_chunks, **held)  # type: ignore[arg-type]


def ready(*kinds: TaskKind) -> list[Event]:
    return [WorkerReady(worker=kind, kind=kind) for kind in kinds or TaskKind]


def stages_of(task: Task, of: RowInventory) -> Iterable[StageCommitted]:
    for stage in range(task.index, of.num_stages):
        chunk = stage - WINDOW + 1
        yield StageCommitted(job_id=of.job_id, stage=stage, chunk=chunk if chunk >= 0 else None)


def play(
    scheduler: Scheduler,
    rows: list[RowInventory],
    events: list[Event],
    fail: Callable[[Task], Event | None] = lambda _: None,
) -> list[Command]:
    """Carry out every command at once and in order; ``fail`` may answer a task with something else than success."""
    held = {one.job_id: one for one in rows}
    by_id = dict(held)
    waiting, commands = deque(events), []
    while waiting:
        event = waiting.popleft()
        note(held, event)
        for command in scheduler.handle(event):
            commands.append(command)
            if isinstance(command, Inspect):
                waiting.append(Inspected(row=held[command.job_id]))
            if isinstance(command, RunTask):
                failed = fail(command.task)
                if failed is not None:
                    waiting.append(failed)
                    continue
                if command.task.kind is TaskKind.DENOISE:
                    waiting.extend(stages_of(command.task, by_id[command.task.job_id]))
                waiting.append(TaskDone(worker=command.worker, task=command.task))
            elif isinstance(command, Replace):
                waiting.append(WorkerReady(worker=f"{command.kind}+{len(commands)}", kind=command.kind))
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


def tasks(commands: list[Command], kind: TaskKind | None = None) -> list[Task]:
    return [c.task for c in commands if isinstance(c, RunTask) and kind in (None, c.task.kind)]


def test_a_row_is_embedded_denoised_decoded_and_finished() -> None:
    rows = [row("a")]
    scheduler = Scheduler(rows)
    commands = play(scheduler, rows, ready())
    assert [(task.kind, task.index) for task in tasks(commands)] == [
        (TaskKind.EMBED, 0), (TaskKind.DENOISE, 0), (TaskKind.DECODE, 0), (TaskKind.DECODE, 1), (TaskKind.FINISH, 0),
    ]  # fmt: skip
    assert scheduler.finished


def test_rows_are_taken_by_priority_and_then_in_the_manifests_order() -> None:
    rows = [row("first"), row("urgent", priority=5), row("second")]
    commands = play(Scheduler(rows), rows, ready())
    assert [task.job_id for task in tasks(commands, TaskKind.DENOISE)] == ["urgent", "first", "second"]


def test_denoising_never_waits_for_decoding() -> None:
    rows = [row("a"), row("b")]
    scheduler = Scheduler(rows)
    commands = play(scheduler, rows, ready(TaskKind.EMBED, TaskKind.DENOISE))
    assert [task.job_id for task in tasks(commands, TaskKind.DENOISE)] == ["a", "b"]
    assert not scheduler.finished
    late = play(scheduler, rows, ready(TaskKind.DECODE, TaskKind.FINISH))
    assert len(tasks(late, TaskKind.DECODE)) == 4
    assert scheduler.finished


def test_a_chunk_is_decoded_while_its_video_is_still_denoised() -> None:
    rows = [row("a", num_chunks=3)]
    scheduler = Scheduler(rows)
    for event in ready():
        scheduler.handle(event)
    scheduler.handle(TaskDone(worker=TaskKind.EMBED, task=Task(kind=TaskKind.EMBED, job_id="a")))
    answers = [
        scheduler.handle(event) for event in list(stages_of(Task(kind=TaskKind.DENOISE, job_id="a"), rows[0]))[:4]
    ]
    assert tasks(answers[3]) == [Task(kind=TaskKind.DECODE, job_id="a", index=0)]


def test_what_the_store_holds_is_not_asked_for_again() -> None:
    rows = [
        row("published", stages_done=5, published=True),
        row("half", embedded=True, stages_done=4, segments_done=frozenset()),
        row("decoded", embedded=True, stages_done=5, segments_done=frozenset({0, 1})),
    ]
    commands = play(Scheduler(rows), rows, ready())
    asked = {(task.kind, task.job_id, task.index) for task in tasks(commands)}
    assert asked == {
        (TaskKind.DENOISE, "half", 4),
        (TaskKind.DECODE, "half", 0),
        (TaskKind.DECODE, "half", 1),
        (TaskKind.FINISH, "half", 0),
        (TaskKind.FINISH, "decoded", 0),
    }


def test_after_a_workers_death_denoising_goes_on_behind_the_last_commit() -> None:
    rows = [row("a")]
    scheduler = Scheduler(rows)
    for event in [*ready(), TaskDone(worker=TaskKind.EMBED, task=Task(kind=TaskKind.EMBED, job_id="a"))]:
        scheduler.handle(event)
    for event in list(stages_of(Task(kind=TaskKind.DENOISE, job_id="a"), rows[0]))[:3]:
        scheduler.handle(event)
    gone = WorkerGone(worker=TaskKind.DENOISE, failure=FailureClass.PREEMPTED, message="spot node taken")
    assert Replace(kind=TaskKind.DENOISE) in scheduler.handle(gone)
    again = scheduler.handle(WorkerReady(worker="another", kind=TaskKind.DENOISE))
    assert tasks(again) == [Task(kind=TaskKind.DENOISE, job_id="a", index=3)]


@pytest.mark.parametrize("failure", [f for f in FailureClass if BUDGETS[f] is not None])
def test_a_row_fails_once_its_class_of_failures_has_used_up_its_budget(failure: FailureClass) -> None:
    rows = [row("poisoned"), row("good")]

    def fail(task: Task) -> Event | None:
        if task.job_id == "poisoned" and task.kind is TaskKind.DENOISE:
            return TaskFailed(worker=TaskKind.DENOISE, task=task, failure=failure, message="no")
        return None

    scheduler = Scheduler(rows)
    commands = play(scheduler, rows, ready(), fail)
    budget = BUDGETS[failure]
    assert budget is not None
    [failed] = [command for command in commands if isinstance(command, RowFailed)]
    assert (failed.job_id, failed.attempts, failed.failure) == ("poisoned", budget + 1, failure)
    assert [task.job_id for task in tasks(commands, TaskKind.FINISH)] == ["good"]
    assert scheduler.finished


def test_denoising_that_gets_further_each_time_is_never_given_up() -> None:
    rows = [row("a", num_chunks=30)]
    scheduler = Scheduler(rows)
    for event in [*ready(), TaskDone(worker=TaskKind.EMBED, task=Task(kind=TaskKind.EMBED, job_id="a"))]:
        scheduler.handle(event)
    worker, first = str(TaskKind.DENOISE), 0
    for stage in range(rows[0].num_stages - 1):
        scheduler.handle(StageCommitted(job_id="a", stage=stage, chunk=None))
        gone = WorkerGone(worker=worker, failure=FailureClass.INFRASTRUCTURE, message="node lost")
        assert scheduler.handle(gone) == [Replace(kind=TaskKind.DENOISE)]
        worker, first = f"denoise-{stage}", stage + 1
        again = scheduler.handle(WorkerReady(worker=worker, kind=TaskKind.DENOISE))
        assert tasks(again) == [Task(kind=TaskKind.DENOISE, job_id="a", index=first)]


def test_denoising_that_fails_after_its_last_commit_has_not_failed() -> None:
    rows = [row("a")]
    scheduler = Scheduler(rows)
    for event in [*ready(), TaskDone(worker=TaskKind.EMBED, task=Task(kind=TaskKind.EMBED, job_id="a"))]:
        scheduler.handle(event)
    denoise = Task(kind=TaskKind.DENOISE, job_id="a")
    for event in stages_of(denoise, rows[0]):
        scheduler.handle(event)
    failed = TaskFailed(worker=TaskKind.DENOISE, task=denoise, failure=FailureClass.INPUT, message="too late to matter")
    # Nothing to try again, and its worker may go only now.
    assert scheduler.handle(failed) == [Release(kind=TaskKind.DENOISE)]


def test_preemption_is_not_counted() -> None:
    rows = [row("a")]
    taken = 0

    def fail(task: Task) -> Event | None:
        nonlocal taken
        if task.kind is TaskKind.DENOISE and taken < 50:
            taken += 1
            return TaskFailed(worker=TaskKind.DENOISE, task=task, failure=FailureClass.PREEMPTED, message="taken")
        return None

    scheduler = Scheduler(rows)
    commands = play(scheduler, rows, ready(), fail)
    assert taken == 50
    assert not any(isinstance(command, RowFailed) for command in commands)
    assert scheduler.finished


def test_a_row_that_failed_in_decoding_is_no_longer_denoised() -> None:
    rows = [row("a", num_chunks=3)]
    scheduler = Scheduler(rows)
    for event in [*ready(), TaskDone(worker=TaskKind.EMBED, task=Task(kind=TaskKind.EMBED, job_id="a"))]:
        scheduler.handle(event)
    for event in list(stages_of(Task(kind=TaskKind.DENOISE, job_id="a"), rows[0]))[:4]:
        scheduler.handle(event)
    decode = Task(kind=TaskKind.DECODE, job_id="a", index=0)
    commands = scheduler.handle(
        TaskFailed(worker=TaskKind.DECODE, task=decode, failure=FailureClass.INPUT, message="not decodable")
    )
    assert Abandon(worker=TaskKind.DENOISE, job_id="a") in commands
    assert not scheduler.finished  # the denoise worker has not answered yet
    scheduler.handle(TaskDone(worker=TaskKind.DENOISE, task=Task(kind=TaskKind.DENOISE, job_id="a")))
    assert scheduler.finished


def test_workers_are_released_once_no_row_needs_their_kind() -> None:
    rows = [row("a"), row("b")]
    commands = play(Scheduler(rows), rows, ready())
    released = [command.kind for command in commands if isinstance(command, Release)]
    assert sorted(released) == sorted(TaskKind)
    last_embed = max(i for i, c in enumerate(commands) if isinstance(c, RunTask) and c.task.kind is TaskKind.EMBED)
    assert commands.index(Release(kind=TaskKind.EMBED)) > last_embed


# Pausing, cancelling, giving up -----------------------------------------------------------------------------------


def at_work(rows: list[RowInventory], **options: int) -> Scheduler:
    """RowInventory 'a' is being denoised by worker 'denoise'."""
    scheduler = Scheduler(rows, **options)
    for event in ready():
        scheduler.handle(event)
    scheduler.handle(TaskDone(worker=TaskKind.EMBED, task=Task(kind=TaskKind.EMBED, job_id="a")))
    return scheduler


def test_a_paused_run_commits_the_stage_in_work_and_begins_nothing() -> None:
    scheduler = at_work([row("a"), row("b")])
    commands = scheduler.handle(PauseAsked())
    assert Abandon(worker=TaskKind.DENOISE, job_id="a", to_stage_end=True) in commands
    assert not scheduler.finished
    assert tasks(scheduler.handle(StageCommitted(job_id="a", stage=0, chunk=None))) == []
    scheduler.handle(TaskDone(worker=TaskKind.EMBED, task=Task(kind=TaskKind.EMBED, job_id="b")))
    last = scheduler.handle(TaskDone(worker=TaskKind.DENOISE, task=Task(kind=TaskKind.DENOISE, job_id="a")))
    assert tasks(last) == []
    assert Release(kind=TaskKind.DENOISE) in last
    assert (scheduler.finished, scheduler.state) == (True, RunState.PAUSED)


def test_a_worker_lost_while_pausing_is_not_replaced() -> None:
    scheduler = at_work([row("a")])
    scheduler.handle(PauseAsked())
    gone = WorkerGone(worker=TaskKind.DENOISE, failure=FailureClass.INFRASTRUCTURE, message="no")
    assert not [command for command in scheduler.handle(gone) if isinstance(command, Replace)]
    assert scheduler.finished


def test_a_cancelled_run_is_at_its_end_at_once() -> None:
    scheduler = at_work([row("a")])
    assert tasks(scheduler.handle(CancelAsked())) == []
    assert (scheduler.finished, scheduler.state) == (True, RunState.CANCELLED)


def test_a_run_whose_last_row_ends_while_it_pauses_is_done() -> None:
    rows = [row("a", stages_done=5, segments_done=frozenset({0, 1}))]
    scheduler = Scheduler(rows)
    [run] = scheduler.handle(WorkerReady(worker="f", kind=TaskKind.FINISH))[:1]
    assert isinstance(run, RunTask)
    scheduler.handle(PauseAsked())
    scheduler.handle(TaskDone(worker="f", task=run.task))
    assert (scheduler.finished, scheduler.state) == (True, RunState.DONE)


def test_a_run_in_which_too_many_rows_fail_is_stopped() -> None:
    rows = [row(name) for name in "abcdef"]

    def fail(task: Task) -> Event | None:
        return TaskFailed(worker=task.kind, task=task, failure=FailureClass.INPUT, message="no")

    scheduler = Scheduler(rows, max_failed_rows=2)
    commands = play(scheduler, rows, ready(), fail)
    assert [c.job_id for c in commands if isinstance(c, RowFailed)] == ["a", "b", "c"]
    assert (scheduler.finished, scheduler.state) == (True, RunState.BROKEN)


def test_a_row_that_failed_before_is_left_alone_and_counts_for_nothing() -> None:
    rows = [row("a", failed=True), row("b")]
    scheduler = Scheduler(rows, max_failed_rows=0)
    assert {task.job_id for task in tasks(play(scheduler, rows, ready()))} == {"b"}
    assert scheduler.state is RunState.DONE


# Nodes --------------------------------------------------------------------------------------------------------------


def seen(*nodes: str, kind: TaskKind = TaskKind.DENOISE) -> NodesSeen:
    return NodesSeen(kind=kind, nodes=frozenset(nodes))


def failed(task: Task, failure: FailureClass = FailureClass.CODE) -> TaskFailed:
    return TaskFailed(worker=task.kind, task=task, failure=failure, message="no")


def test_a_row_is_not_tried_twice_on_one_node() -> None:
    rows = [row("a", embedded=True)]
    scheduler = Scheduler(rows)
    scheduler.handle(seen("n1", "n2"))
    [run] = tasks(scheduler.handle(WorkerReady(worker=TaskKind.DENOISE, kind=TaskKind.DENOISE, node="n1")))
    commands = scheduler.handle(failed(run))
    assert commands == [Replace(kind=TaskKind.DENOISE, worker=TaskKind.DENOISE, avoid=frozenset({"n1"}))]
    [again] = tasks(scheduler.handle(WorkerReady(worker="elsewhere", kind=TaskKind.DENOISE, node="n2")))
    assert again == run


def test_meanwhile_the_node_takes_other_rows() -> None:
    rows = [row("a", embedded=True), row("b", embedded=True)]
    scheduler = Scheduler(rows)
    scheduler.handle(seen("n1", "n2"))
    [run] = tasks(scheduler.handle(WorkerReady(worker=TaskKind.DENOISE, kind=TaskKind.DENOISE, node="n1")))
    assert [task.job_id for task in tasks(scheduler.handle(failed(run)))] == ["b"]


def test_a_lost_worker_is_replaced_on_another_node() -> None:
    scheduler = Scheduler([row("a", embedded=True)])
    scheduler.handle(seen("n1", "n2"))
    scheduler.handle(WorkerReady(worker="w", kind=TaskKind.DENOISE, node="n1"))
    commands = scheduler.handle(WorkerGone(worker="w", failure=FailureClass.INFRASTRUCTURE, message="no"))
    assert commands == [Replace(kind=TaskKind.DENOISE, avoid=frozenset({"n1"}))]


def test_where_there_is_one_node_only_it_gets_another_chance() -> None:
    scheduler = Scheduler([row("a", embedded=True)])
    scheduler.handle(seen("n1"))
    [run] = tasks(scheduler.handle(WorkerReady(worker=TaskKind.DENOISE, kind=TaskKind.DENOISE, node="n1")))
    assert tasks(scheduler.handle(failed(run))) == [run]


@pytest.mark.parametrize("failure", [FailureClass.PREEMPTED, FailureClass.STORE])
def test_what_is_not_the_nodes_fault_is_not_held_against_it(failure: FailureClass) -> None:
    scheduler = Scheduler([row("a", embedded=True)])
    scheduler.handle(seen("n1", "n2"))
    scheduler.handle(WorkerReady(worker="w", kind=TaskKind.DENOISE, node="n1"))
    commands = scheduler.handle(WorkerGone(worker="w", failure=failure, message="no"))
    assert Replace(kind=TaskKind.DENOISE, avoid=frozenset()) in commands


def test_a_node_on_which_several_rows_failed_is_left_alone() -> None:
    names = [f"r{number}" for number in range(ROWS_FAILED_ON_BAD_NODE)]
    rows = [row(name, embedded=True) for name in [*names, "good"]]
    scheduler = Scheduler(rows)
    scheduler.handle(seen("n1", "n2"))
    commands = scheduler.handle(WorkerReady(worker=TaskKind.DENOISE, kind=TaskKind.DENOISE, node="n1"))
    for _ in names:
        [run] = tasks(commands)
        commands = scheduler.handle(failed(run))
    assert commands == [Replace(kind=TaskKind.DENOISE, worker=TaskKind.DENOISE, avoid=frozenset({"n1"}))]
    # And once the other node is gone, it is better than none.
    scheduler.handle(seen("n1"))
    assert tasks(scheduler.handle(WorkerReady(worker="w", kind=TaskKind.DENOISE, node="n1")))


# What the store turned out not to hold --------------------------------------------------------------------------------


def test_a_chunk_that_turns_out_damaged_is_rendered_again_once_its_video_is_denoised() -> None:
    rows = [row("a", embedded=True, num_chunks=4)]
    scheduler = Scheduler(rows)
    [denoise] = tasks(scheduler.handle(WorkerReady(worker=TaskKind.DENOISE, kind=TaskKind.DENOISE)))
    scheduler.handle(WorkerReady(worker=TaskKind.DECODE, kind=TaskKind.DECODE))
    committed = list(stages_of(denoise, rows[0]))
    commands = [c for event in committed[:5] for c in scheduler.handle(event)]
    decode = tasks(commands, TaskKind.DECODE)[0]
    assert Inspect(job_id="a") in scheduler.handle(failed(decode, FailureClass.STORE))
    found = replace(rows[0], stages_done=3)
    assert tasks(scheduler.handle(Inspected(row=found)), TaskKind.DENOISE) == []
    for event in committed[5:]:
        scheduler.handle(event)
    [again] = tasks(scheduler.handle(TaskDone(worker=TaskKind.DENOISE, task=denoise)), TaskKind.DENOISE)
    assert again.index == 3


def test_a_segment_that_turns_out_damaged_is_decoded_again_before_the_video_is_joined() -> None:
    rows = [row("a", stages_done=5, segments_done=frozenset({0, 1}))]
    scheduler = Scheduler(rows)
    [finish] = tasks(scheduler.handle(WorkerReady(worker=TaskKind.FINISH, kind=TaskKind.FINISH)))
    scheduler.handle(WorkerReady(worker=TaskKind.DECODE, kind=TaskKind.DECODE))
    assert scheduler.handle(failed(finish, FailureClass.STORE)) == [Inspect(job_id="a")]
    [decode] = tasks(scheduler.handle(Inspected(row=replace(rows[0], segments_done=frozenset({0})))))
    assert decode == Task(kind=TaskKind.DECODE, job_id="a", index=1)
    assert tasks(scheduler.handle(TaskDone(worker=TaskKind.DECODE, task=decode))) == [finish]


def test_workers_that_were_let_go_are_called_for_again_when_their_work_turns_out_lost() -> None:
    rows = [row("a", embedded=True, stages_done=5, segments_done=frozenset({0, 1}))]
    scheduler = Scheduler(rows)
    commands = scheduler.handle(WorkerReady(worker=TaskKind.FINISH, kind=TaskKind.FINISH))
    assert Release(kind=TaskKind.DENOISE) in commands
    [finish] = tasks(commands)
    scheduler.handle(failed(finish, FailureClass.STORE))
    commands = scheduler.handle(Inspected(row=replace(rows[0], stages_done=3, segments_done=frozenset())))
    assert {command.kind for command in commands if isinstance(command, Replace)} == {TaskKind.DENOISE, TaskKind.DECODE}
