"""Another ffmpeg than before: what it encodes again is counted before it begins."""

from __future__ import annotations

import json

import pytest
from runs import MakeRun, by_progress

from magi_ray.media.encoder import encoder_identity, find_ffmpeg
from magi_ray.render.driving import local
from magi_ray.render.driving.local import render_locally
from magi_ray.render.driving.progress import RunProgress
from magi_ray.render.tasks import loading
from magi_ray.render.upkeep.reencoding import reencoding
from magi_ray.storage import keys
from magi_ray.storage.memory import MemoryStore

ROWS = [{"job_id": "a", "prompt": "sea", "num_chunks": 1}, {"job_id": "b", "prompt": "hills", "num_chunks": 3}]
OTHER = "ffmpeg 3.4, x264 152"


@pytest.mark.parametrize("noted", [True, False], ids=["noted by its driver", "only said by a finished video"])
def test_what_another_ffmpeg_encodes_again_is_what_was_counted(
    noted: bool, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = MemoryStore()
    run = make_run(store, ROWS)
    here = encoder_identity(find_ffmpeg())
    assert reencoding(store, run, here) is None, "nothing was rendered yet"

    def interrupt(progress: RunProgress) -> None:
        if progress.videos["b"].chunks_done == 2:
            raise KeyboardInterrupt

    for module in (local, loading):  # as on a machine with that ffmpeg
        name = "check_machine" if module is local else "encoder_identity"
        monkeypatch.setattr(module, name, lambda _: OTHER)
    with pytest.raises(KeyboardInterrupt):
        render_locally(store, run, observers=by_progress(interrupt))
    assert reencoding(store, run, OTHER) is None
    monkeypatch.undo()
    if not noted:
        content = json.loads(store.get(keys.run_progress(run.run_id)))
        del content["encoder"]
        store.put(keys.run_progress(run.run_id), json.dumps(content).encode())

    found = reencoding(store, run, here)
    assert found is not None
    assert (found.before, found.here, found.chunks) == (OTHER, here, 2)
    assert f"This machine has {here}, but {OTHER} encoded" in str(found)
    assert "decoded and encoded again: 2." in str(found)
    done_too = reencoding(store, run, here, retry={"a"})
    assert done_too is not None
    assert done_too.chunks == 3
    segments = len(list(store.list("segments/")))
    render_locally(store, run)
    assert len(list(store.list("segments/"))) == segments + 2 * (2 + 1), "two objects for each of 3 chunks"
    assert reencoding(store, run, here) is None
