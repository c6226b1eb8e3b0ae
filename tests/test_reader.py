"""The contract of every reader: buffers are full, or an error says what was wrong.

Those of installed packages are held to it too.
"""

import errno
import gc
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from mlx_flash import plugins
from mlx_flash.errors import ReadError
from mlx_flash.kernels import native
from mlx_flash.streaming import reader as module
from mlx_flash.streaming.checkpoint import Span
from mlx_flash.streaming.reader import READERS, Job, NativeReader, Reader

FILE_BYTES = 1 << 20
OVER_INLINE = 64 << 10  # eight spans of this size are read in parallel
SMALL, LARGE = 1000, OVER_INLINE

Open = Callable[..., Reader]


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / name for name in ("c.bin", "a.bin", "b.bin")]
    for seed, path in enumerate(paths):
        path.write_bytes(random.Random(seed).randbytes(FILE_BYTES))
    return paths


@pytest.fixture(params=[*READERS, *plugins.names(plugins.READERS)])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def open_reader(name: str) -> Iterator[Open]:
    opened: list[Reader] = []

    def open_one(paths: Sequence[Path], threads: int = 4) -> Reader:
        opened.append(plugins.open_reader(name, paths, threads))
        return opened[-1]

    yield open_one
    for reader in opened:
        reader.close()


@pytest.fixture
def preadv(name: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., int]], None]:
    """Puts a function ``(real, fd, buffers, offset) -> n`` in the place of os.preadv."""
    if name not in READERS:
        pytest.skip("how it reads is its own affair")
    real = os.preadv

    def put(fake: Callable[..., int]) -> None:
        monkeypatch.setattr(os, "preadv", lambda *args: fake(real, *args))

    return put


def jobs_of(path: Path, offsets: Sequence[int], nbytes: int) -> list[Job]:
    return [(Span(path, at, nbytes), memoryview(bytearray(nbytes))) for at in offsets]


def scattered(path: Path, nbytes: int, count: int = 8) -> list[Job]:
    """Jobs with a gap after each, so that no two are one request."""
    return jobs_of(path, range(0, 2 * nbytes * count, 2 * nbytes)[:count], nbytes)


def check(jobs: Sequence[Job], content: bytes | None = None) -> None:
    for span, buffer in jobs:
        data = content if content is not None else span.path.read_bytes()
        pieces = (data[p.offset : p.offset + p.nbytes] for p in span.pieces())
        assert buffer == b"".join(pieces)


def strided(path: Path, offset: int, count: int, piece: int, stride: int) -> Job:
    span = Span(path, offset, count * piece, piece, stride)
    return span, memoryview(bytearray(span.nbytes))


# Every reader


@pytest.mark.parametrize("nbytes", [1, SMALL, LARGE])
@pytest.mark.parametrize("threads", [1, 4])
def test_fills_buffers_from_several_files(
    open_reader: Open, files: list[Path], nbytes: int, threads: int
) -> None:
    jobs = [job for path in files for job in scattered(path, nbytes)]
    jobs += jobs_of(files[0], [FILE_BYTES - nbytes], nbytes)
    random.Random(0).shuffle(jobs)
    reader = open_reader(files, threads)
    reader.read_into(jobs)
    check(jobs)
    assert reader.bytes_read == nbytes * len(jobs)
    assert reader.read_s > 0


def test_counts_add_up(open_reader: Open, files: list[Path]) -> None:
    reader = open_reader(files)
    for n in range(1, 4):
        reader.read_into(scattered(files[0], SMALL, 2))
        assert reader.bytes_read == n * 2 * SMALL


@pytest.mark.skipif(native() is None, reason="SKIPPED LOUDLY: the native kernels are not built")
@pytest.mark.parametrize("direct", [False, True])
def test_the_native_files_are_a_reader(files: list[Path], direct: bool) -> None:
    reader: Reader = NativeReader(native().Files([str(p) for p in files], 4, direct), files)
    spans = [Span(files[i % 3], 70_000 * i + 13, 60_000) for i in range(9)]
    buffers = [bytearray(span.nbytes) for span in spans]
    reader.read_into([(s, memoryview(b)) for s, b in zip(spans, buffers, strict=True)])
    for span, buffer in zip(spans, buffers, strict=True):
        assert buffer == span.path.read_bytes()[span.offset :][: span.nbytes]
    assert reader.bytes_read == 9 * 60_000
    assert reader.read_s > 0
    reader.read_into([])
    with pytest.raises(ReadError, match="short"):
        past = Span(files[0], FILE_BYTES - 10, 20)
        reader.read_into([(past, memoryview(bytearray(20)))])
    reader.close()
    with pytest.raises(ReadError, match="closed"):
        reader.read_into([(spans[0], memoryview(buffers[0]))])


def test_adjacent_overlapping_and_repeated_spans(open_reader: Open, files: list[Path]) -> None:
    jobs = jobs_of(files[0], [5, 5, 105, 205, 150, 305], 100)
    open_reader(files).read_into(jobs)
    check(jobs)


@pytest.mark.parametrize("seed", range(40))
def test_strided_spans_of_any_layout(open_reader: Open, files: list[Path], seed: int) -> None:
    rng = random.Random(seed)
    jobs = []
    for _ in range(rng.randint(1, 8)):
        piece = rng.choice([1, 2, 90, 1440, 5000, 70_000])
        stride = piece + rng.choice([0, 1, piece, 3 * piece, 70_000])
        offset = rng.randrange(4 * piece)
        most = 1 + (FILE_BYTES - offset - piece) // stride
        count = rng.choice([1, most, rng.randint(1, most)])
        jobs.append(strided(rng.choice(files), offset, count, piece, stride))
    jobs += jobs_of(files[0], [5, 105, 1005], 100)
    rng.shuffle(jobs)
    open_reader(files, rng.choice([1, 3])).read_into(jobs)
    check(jobs)


@pytest.mark.parametrize("piece", [2, 90, 1440, 70_000])
def test_what_interleaves_is_read_once(
    open_reader: Open, files: list[Path], preadv: Any, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_COMB_BYTES", 100_000)  # several requests
    came: list[int] = []

    def count(real: Any, *args: Any) -> int:
        came.append(real(*args))
        return came[-1]

    preadv(count)
    reader = open_reader(files)
    pieces = (FILE_BYTES - 3) // (2 * piece)
    jobs = [strided(files[0], 3 + half * piece, pieces, piece, 2 * piece) for half in (1, 0)]
    reader.read_into(jobs)
    check(jobs)
    assert reader.bytes_read == sum(came) == 2 * pieces * piece
    assert len(came) >= 5 or piece > module.MAX_PIECE_BYTES  # these are adjacent
    alone = [strided(files[0], 3, pieces, piece, 2 * piece)]
    before = reader.bytes_read
    reader.read_into(alone)
    check(alone)
    assert pieces * piece <= reader.bytes_read - before <= 2 * pieces * piece
    assert reader.bytes_read == sum(came)


def test_spans_out_of_step_stay_within_limits(
    open_reader: Open, files: list[Path], preadv: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Each request of one overlaps two of the other: joined, all would need memory for all.
    monkeypatch.setattr(module, "MAX_COMB_BYTES", 100_000)
    sizes: list[int] = []

    def note(real: Any, fd: int, buffers: Any, offset: int) -> int:
        sizes.append(sum(map(len, buffers)))
        return real(fd, buffers, offset)

    preadv(note)
    jobs = [strided(files[0], offset, 4000, 100, 200) for offset in (0, 50_100)]
    open_reader(files).read_into(jobs)
    check(jobs)
    assert max(sizes) <= 100_000


def test_strided_spans_past_the_end(open_reader: Open, files: list[Path]) -> None:
    reader = open_reader(files)
    for piece in (2, 1440, 70_000):
        count = FILE_BYTES // (2 * piece)
        offset = FILE_BYTES - (count - 1) * 2 * piece - piece + 1
        job = strided(files[0], offset, count, piece, 2 * piece)
        with pytest.raises(ReadError, match=f"ends at byte {FILE_BYTES}, 1 bytes short"):
            reader.read_into([job])


def test_nothing_to_do(open_reader: Open, files: list[Path]) -> None:
    reader = open_reader(files)
    reader.read_into([])
    reader.read_into(jobs_of(files[0], [0, FILE_BYTES], 0))
    jobs = [*jobs_of(files[0], [0], 0), *jobs_of(files[0], [0], 10), *jobs_of(files[0], [10], 0)]
    reader.read_into(jobs)
    check(jobs)
    assert reader.bytes_read == 10


@pytest.mark.parametrize("nbytes", [SMALL, LARGE])
def test_span_past_the_end(open_reader: Open, files: list[Path], nbytes: int) -> None:
    jobs = [*scattered(files[1], nbytes), *jobs_of(files[0], [FILE_BYTES - nbytes + 7], nbytes)]
    reader = open_reader(files)
    with pytest.raises(ReadError, match=f"ends at byte {FILE_BYTES}, 7 bytes short") as caught:
        reader.read_into(jobs)
    assert caught.value.errno == errno.ENODATA
    assert str(files[0]) in str(caught.value) and "download it again" in str(caught.value)
    good = scattered(files[1], nbytes)
    reader.read_into(good)
    check(good)


@pytest.mark.parametrize("nbytes", [SMALL, LARGE])
def test_file_truncated_after_opening(open_reader: Open, files: list[Path], nbytes: int) -> None:
    reader = open_reader(files)
    os.truncate(files[0], 3 * nbytes)
    jobs = [*scattered(files[1], nbytes), *jobs_of(files[0], [0, 3 * nbytes - 7], nbytes)]
    with pytest.raises(ReadError, match=f"ends at byte {3 * nbytes}, {nbytes - 7} b") as caught:
        reader.read_into(jobs)
    assert caught.value.filename == files[0]
    with pytest.raises(ReadError, match="changed on disk"):  # though these bytes are still there
        reader.read_into(jobs_of(files[0], [0], nbytes))


def test_file_modified_after_opening(open_reader: Open, files: list[Path]) -> None:
    reader = open_reader(files)
    before = files[0].stat()
    with files[0].open("r+b") as file:
        file.write(b"other bytes")
    os.utime(files[0], ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    with pytest.raises(ReadError, match="changed on disk since it was loaded; load") as caught:
        reader.read_into(scattered(files[0], SMALL))
    assert caught.value.errno == errno.ESTALE and caught.value.filename == files[0]
    jobs = scattered(files[1], SMALL)
    reader.read_into(jobs)
    check(jobs)


@pytest.mark.parametrize("replace", [False, True])
def test_file_deleted_after_opening(open_reader: Open, files: list[Path], replace: bool) -> None:
    content = files[0].read_bytes()
    reader = open_reader(files)
    if replace:
        files[1].replace(files[0])
    else:
        files[0].unlink()
    jobs = scattered(files[0], LARGE)
    reader.read_into(jobs)
    check(jobs, content)


def test_missing_file(open_reader: Open, files: list[Path]) -> None:
    before = psutil.Process().num_fds()
    gone = files[0].with_name("gone.bin")
    with pytest.raises(ReadError, match="cannot be opened: No such file") as caught:
        open_reader([*files, gone])
    assert caught.value.errno == errno.ENOENT and caught.value.filename == gone
    assert psutil.Process().num_fds() == before


def test_close_gives_back_files_and_threads(open_reader: Open, files: list[Path]) -> None:
    fds, threads = psutil.Process().num_fds(), threading.active_count()
    reader = open_reader(files)
    reader.read_into(scattered(files[0], LARGE))
    assert psutil.Process().num_fds() > fds
    reader.close()
    reader.close()
    assert psutil.Process().num_fds() == fds
    assert threading.active_count() == threads


def test_a_reader_that_is_dropped_waits_for_no_thread(
    files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The collector may run anywhere, also where threading holds the lock that a join wants.
    fds, threads = psutil.Process().num_fds(), threading.active_count()
    readers = [READERS[name](files, 4) for name in READERS]
    for reader in readers:
        reader.read_into(scattered(files[0], LARGE))
    del reader
    joined: list[threading.Thread] = []
    monkeypatch.setattr(threading.Thread, "join", lambda thread, *_: joined.append(thread))
    readers.clear()
    gc.collect()
    assert not joined
    assert psutil.Process().num_fds() == fds
    deadline = time.monotonic() + 10
    while threading.active_count() > threads:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_shared_by_threads(open_reader: Open, files: list[Path]) -> None:
    reader = open_reader(files, 2)
    batches = [scattered(files[i % 3], (SMALL, LARGE)[i % 2]) for i in range(24)]
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(reader.read_into, batches))
    for jobs in batches:
        check(jobs)
    assert reader.bytes_read == sum(span.nbytes for jobs in batches for span, _ in jobs)


# Readers that read through os.preadv


def test_adjacent_spans_are_one_request(open_reader: Open, files: list[Path], preadv: Any) -> None:
    requests: list[tuple[int, int]] = []

    def count(real: Any, fd: int, buffers: Any, offset: int) -> int:
        requests.append((offset, len(buffers)))
        return real(fd, buffers, offset)

    preadv(count)
    jobs = jobs_of(files[0], [400, 100, 300, 200, 600, 700], 100)
    open_reader(files).read_into(jobs)
    check(jobs)
    assert sorted(requests) == [(100, 4), (600, 2)]


def test_spans_that_touch_across_files_are_two_requests(
    open_reader: Open, tmp_path: Path, preadv: Any
) -> None:
    calls: list[int] = []
    preadv(lambda real, *args: (calls.append(1), real(*args))[1])
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(name.encode() * 20)
    jobs = [*jobs_of(tmp_path / "a", [0], 10), *jobs_of(tmp_path / "b", [10], 10)]
    open_reader([tmp_path / "a", tmp_path / "b"]).read_into(jobs)
    check(jobs)
    assert len(calls) == 2


def test_requests_stay_within_limits(
    open_reader: Open, files: list[Path], preadv: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    widths: list[tuple[int, int]] = []

    def note(real: Any, fd: int, buffers: Any, offset: int) -> int:
        widths.append((len(buffers), sum(map(len, buffers))))
        return real(fd, buffers, offset)

    preadv(note)
    reader = open_reader(files)
    many = jobs_of(files[0], range(3000), 1)
    reader.read_into(many)
    check(many)
    assert max(n for n, _ in widths) <= module.MAX_RUN_BUFFERS and len(widths) == 6
    widths.clear()
    monkeypatch.setattr(module, "MAX_RUN_BYTES", 250)
    large = [*jobs_of(files[0], range(0, 1000, 100), 100), *jobs_of(files[0], [1000], 400)]
    reader.read_into(large)
    check(large)
    assert sorted(nbytes for _, nbytes in widths) == [200] * 5 + [400]


@pytest.mark.parametrize("nbytes", [SMALL, LARGE])
def test_short_reads_are_resumed(
    open_reader: Open, files: list[Path], preadv: Any, nbytes: int
) -> None:
    def short(real: Any, fd: int, buffers: list[memoryview], offset: int) -> int:
        left, some = 700, []
        for buffer in buffers:
            some.append(buffer[:left])
            left -= len(some[-1])
        return real(fd, some, offset)

    preadv(short)
    jobs = [*jobs_of(files[0], range(0, 6 * nbytes, nbytes), nbytes), *scattered(files[1], nbytes)]
    open_reader(files).read_into(jobs)
    check(jobs)


@pytest.mark.parametrize("nbytes", [SMALL, LARGE])
def test_disk_error(open_reader: Open, files: list[Path], preadv: Any, nbytes: int) -> None:
    bad = 6 * nbytes

    def fail(real: Any, fd: int, buffers: Any, offset: int) -> int:
        if offset == bad:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(fd, buffers, offset)

    preadv(fail)
    reader = open_reader(files)
    with pytest.raises(ReadError, match=f"{os.strerror(errno.EIO)} at byte {bad}; ch") as caught:
        reader.read_into(scattered(files[0], nbytes))
    assert caught.value.errno == errno.EIO and caught.value.filename == files[0]
    assert str(files[0]) in str(caught.value) and len(str(caught.value).splitlines()) == 1
    assert isinstance(caught.value.__cause__, OSError)
    bad = -1
    jobs = scattered(files[0], nbytes)
    reader.read_into(jobs)
    check(jobs)


@pytest.mark.parametrize("at", [2, 9])  # while threads start, and while all read
@pytest.mark.parametrize("fault", [KeyboardInterrupt, OSError])
def test_no_read_writes_after_an_error(
    open_reader: Open, files: list[Path], preadv: Any, fault: type[BaseException], at: int
) -> None:
    """Ctrl-C in the thread that waits, or a fault in one that reads: the others have ended."""
    calls = 0
    lock = threading.Lock()

    def slow(real: Any, fd: int, buffers: Any, offset: int) -> int:
        nonlocal calls
        with lock:
            calls += 1
            mine = calls
        if mine == at and fault is OSError:
            raise OSError(errno.EIO, "fault")
        if mine == at:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        time.sleep(0.05)
        return real(fd, buffers, offset)

    preadv(slow)
    reader = open_reader(files, 4)
    jobs = scattered(files[0], 16 << 10, 32)
    with pytest.raises(KeyboardInterrupt if fault is KeyboardInterrupt else ReadError):
        reader.read_into(jobs)
    asked, then = calls, [bytes(buffer) for _, buffer in jobs]
    time.sleep(0.15)
    assert calls == asked < len(jobs)
    assert [bytes(buffer) for _, buffer in jobs] == then
    assert any(not any(buffer) for buffer in then)  # it did stop before the end
    again = scattered(files[1], 16 << 10, 32)
    preadv(lambda real, *args: real(*args))
    reader.read_into(again)
    check(again)
