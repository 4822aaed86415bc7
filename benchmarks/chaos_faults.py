"""What the chaos benchmark does to a command, and when: both follow from the seed.

A plan says for each fault when it is due: by how much of the work is done, or so many seconds after the
fault (or the start) before it, which is how faults meet commands that are still starting or recovering.
"""

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from subprocess import Popen

from benchmarks.chaos_places import Place
from benchmarks.chaos_processes import below
from benchmarks.faulty_store import MIXED_WAYS
from benchmarks.process_tree import descendants
from recgpt import storage
from recgpt.training import checkpoint

TRAIN, GENERATE = VERBS = ("train", "generate")
WORKER_OF = {TRAIN: "ray::RayTrainWorker", GENERATE: "ray::RecallWorker"}
RAYLET = "/raylet/raylet"
STOPPED = 128 + signal.SIGTERM
RAY_LOST = (1, 2)  # Ray itself may end a driver that has lost its raylet, with 1
SHARE_AT_ONCE = 0.25  # of the faults come right after the one before
LONGEST_PAUSE = 8.0  # seconds between the two
SHARE_OF_REQUESTS = 0.2  # that fail, where not all do
OUTAGE_SECONDS = (5.0, 20.0)
OUTAGE_WAYS = ("503", "reset", "stall")
SECONDS_TO_DIE = 60.0


@dataclass(frozen=True)
class Scene:
    """Where a fault takes place."""

    verb: str
    driver: Popen[bytes]
    place: Place
    run: str
    """The run folder that is trained in or recalled from."""

    def workers(self) -> list[int]:
        return below(self.driver.pid, WORKER_OF[self.verb])


@dataclass(frozen=True)
class Fault:
    """One of a plan."""

    kind: str
    share: float | None
    """Of the work that is done when it is due; None: it comes after a pause."""
    pause: float
    chance: float
    """Decides, from 0 to 1, whatever else there is to choose."""

    def choose(self, options: list[int]) -> int:
        return options[int(self.chance * len(options))]


@dataclass(frozen=True)
class Kind:
    """A way to disturb a command."""

    inject: Callable[[Scene, Fault], str]
    """Does it, and says what was done."""
    statuses: tuple[int, ...]
    """With which the command may end because of it, besides 0."""
    possible: Callable[[Scene], bool]
    """Whether there is something to disturb; until then the fault waits."""
    ends_command: bool = False
    verbs: tuple[str, ...] = VERBS
    needs_store: bool = False


def _send(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return  # it has just ended by itself


def _kill_worker(scene: Scene, fault: Fault) -> str:
    victim = fault.choose(scene.workers())
    _send(victim, signal.SIGKILL)
    return f"process {victim}"


def _stop_worker(scene: Scene, fault: Fault) -> str:
    victim = fault.choose(scene.workers())
    _send(victim, signal.SIGSTOP)
    return f"process {victim}"


def _kill_driver(scene: Scene, fault: Fault) -> str:
    scene.driver.kill()
    scene.driver.wait()
    return f"process {scene.driver.pid}"


def _terminate_driver(scene: Scene, fault: Fault) -> str:
    scene.driver.terminate()
    return f"process {scene.driver.pid}"


def _kill_raylet(scene: Scene, fault: Fault) -> str:
    victim = fault.choose(below(scene.driver.pid, RAYLET))
    _send(victim, signal.SIGKILL)
    return f"process {victim}"


def _damage(scene: Scene, fault: Fault) -> str:
    """With the driver down, spoil the newest checkpoint."""
    workers = scene.workers()
    _kill_driver(scene, fault)
    deadline = time.monotonic() + SECONDS_TO_DIE
    while set(workers) & set(descendants()) and time.monotonic() < deadline:
        time.sleep(0.1)  # they may be writing one more
    name = checkpoint.newest(scene.run)
    assert name is not None
    folder = storage.join(scene.run, checkpoint.FOLDER, name)
    manifest = checkpoint.read_manifest(scene.run, name)
    file = manifest.files[int(fault.chance * 1000) % len(manifest.files)].file
    way = ("a bit of {file} flipped", "{file} cut off", "without its manifest")[int(fault.chance * 3)]
    if "manifest" in way:
        storage.remove(storage.join(folder, "manifest.json"))
    else:
        data = bytearray(storage.read_bytes(storage.join(folder, file)))
        middle = len(data) // 2
        data[middle] ^= 1
        storage.write_bytes(storage.join(folder, file), bytes(data[:middle] if "cut" in way else data))
    return f"{name}: {way.format(file=file)}"


def _outage(scene: Scene, fault: Fault) -> str:
    proxy = scene.place.faulty_store()
    shortest, longest = OUTAGE_SECONDS
    seconds = shortest + fault.chance * (longest - shortest)
    way = OUTAGE_WAYS[int(fault.chance * 1000) % len(OUTAGE_WAYS)]
    proxy.fail(way, seconds=seconds)
    threading.Timer(seconds, proxy.heal).start()  # what stalls is let go
    return f"{seconds:.0f} s, {way}"


def _failing_requests(scene: Scene, fault: Fault) -> str:
    seconds = OUTAGE_SECONDS[1]
    ways = MIXED_WAYS
    scene.place.faulty_store().fail(
        *ways, share=SHARE_OF_REQUESTS, seconds=seconds, seed=int(fault.chance * 2**32)
    )
    return f"{SHARE_OF_REQUESTS:.0%} for {seconds:.0f} s"


def _always(scene: Scene) -> bool:
    return True


def _has_worker(scene: Scene) -> bool:
    return bool(scene.workers())


def _has_raylet(scene: Scene) -> bool:
    return bool(below(scene.driver.pid, RAYLET))


def _has_spare_checkpoint(scene: Scene) -> bool:
    return len(checkpoint.finished(scene.run)) >= 2


KILL_ACTOR = "kill a recall actor"
STOP_WORKER = "stop a training worker"
DAMAGE = "damage the newest checkpoint"  # while the driver is down
KINDS = {
    # A command gives up when it has lost more workers than --max-failures allows.
    "kill a training worker": Kind(_kill_worker, (2,), _has_worker, verbs=(TRAIN,)),
    STOP_WORKER: Kind(_stop_worker, (2,), _has_worker, verbs=(TRAIN,)),
    KILL_ACTOR: Kind(_kill_worker, (), _has_worker, verbs=(GENERATE,)),
    "kill the driver": Kind(_kill_driver, (-signal.SIGKILL,), _always, ends_command=True),
    "SIGTERM the driver": Kind(_terminate_driver, (STOPPED,), _has_worker, ends_command=True),
    "kill the raylet": Kind(_kill_raylet, RAY_LOST, _has_raylet, ends_command=True),
    DAMAGE: Kind(_damage, (-signal.SIGKILL,), _has_spare_checkpoint, ends_command=True, verbs=(TRAIN,)),
    "outage of the object store": Kind(_outage, (), _always, needs_store=True),
    "failing requests": Kind(_failing_requests, (), _always, needs_store=True),
}


def plan(seed: int, round_number: int, verb: str, with_store: bool, faults: int) -> list[Fault]:
    """The faults of one command in one round, of different kinds, in the order in which they come."""
    chance = random.Random(f"{seed}/{round_number}/{verb}")
    kinds = [name for name, kind in KINDS.items() if verb in kind.verbs and kind.needs_store <= with_store]
    drawn = chance.sample(kinds, min(faults, len(kinds)))
    return list(_timed(drawn, chance))


def _timed(kinds: list[str], chance: random.Random) -> Iterator[Fault]:
    shares = sorted(chance.uniform(0.05, 0.9) for _ in kinds)
    for kind, share in zip(kinds, shares, strict=True):
        at_once = chance.random() < SHARE_AT_ONCE
        yield Fault(kind, None if at_once else share, chance.uniform(0, LONGEST_PAUSE), chance.random())
