"""Locks on artifacts in use: who holds them, when they end, and the time of the last use."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.store import in_use
from tests.support.tiny import python

HOUR_S = 3600


@pytest.fixture(autouse=True)
def nothing_held(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Start each test without locks of this process on artifacts."""
    monkeypatch.setattr(in_use, "_held", {})
    yield
    in_use.release()


def is_free(file: Path) -> bool:
    with file.open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def test_an_artifact_in_use_is_locked_until_the_process_ends(tmp_path: Path) -> None:
    artifact = tmp_path / "engine" / "tiny-0123"
    assert in_use.last_use(artifact) is None
    script = f"from pathlib import Path; from pipeline.store import in_use; in_use.hold(Path({str(artifact)!r}))"
    assert python("-c", script).returncode == 0
    assert in_use.last_use(artifact) == pytest.approx(time.time(), abs=60)
    assert is_free(in_use.lock_file(artifact))
    in_use.hold(artifact)
    assert not is_free(in_use.lock_file(artifact))
    assert is_free(in_use.build_lock(artifact))  # whoever uses an artifact does not build it


def test_users_share_a_lock_and_a_builder_waits_for_it(tmp_path: Path) -> None:
    file, waits = tmp_path / "lock", []

    def released() -> None:
        waits.append("once")
        second.close()

    with in_use.locked(file, exclusive=False):
        second = in_use.locked(file, exclusive=False)
    with in_use.locked(file, exclusive=True, waits=released):
        assert not is_free(file)
    assert waits == ["once"] and is_free(file)


def test_a_lock_file_that_is_deleted_meanwhile_is_made_again(tmp_path: Path) -> None:
    file = tmp_path / "lock"
    first = in_use.locked(file, exclusive=True)

    def deleted() -> None:
        file.unlink()
        first.close()

    with in_use.locked(file, exclusive=True, waits=deleted) as lock:
        assert os.path.samestat(os.fstat(lock.fileno()), file.stat())


def test_the_time_of_use_is_kept_to_the_hour(tmp_path: Path) -> None:
    artifact = tmp_path / "tiny-0123"
    in_use.hold(artifact)
    for ago, noted in ((HOUR_S / 2, False), (2 * HOUR_S, True)):
        before = time.time() - ago
        os.utime(in_use.lock_file(artifact), (before, before))
        in_use.hold(artifact)
        assert (in_use.last_use(artifact) != pytest.approx(before)) == noted


def test_the_oldest_locks_are_released_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_use, "_MOST", 2)
    artifacts = [tmp_path / str(number) for number in range(3)]
    for artifact in artifacts:
        in_use.hold(artifact)
    assert [is_free(in_use.lock_file(artifact)) for artifact in artifacts] == [True, False, False]
