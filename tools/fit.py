"""Does a run fit hardware that is not here? Its steps are compiled ahead of time to know it.

    python train.py fit CONFIG --topology v5e:4x4 [--json] [--path.to.field VALUE ...]
    python train.py fit CONFIG --topology h100:8 [--json] ...          h100:4x8: four hosts
    python train.py fit CONFIG --devices 8 [--json] ...

--topology: TPU chips (v4, v5e, v5p, v6e, tpu7x) by the TPU's own compiler, libtpu, of the version
that jax asks for, or GPUs (a100, h100, h200, b200, a10, l4, rtx4090, t4) by jax's CUDA plugin. Where
these are absent, the command to get them is said. They go to the cache directory, as beside jax they
slow each start.
A GPU's limit is the part of its memory that jax takes: 3/4, or XLA_PYTHON_CLIENT_MEM_FRACTION.
--devices: so many of what is here; any number of CPUs. --segments: the most that a row has, which
cuDNN's attention depends on. --json: the last line is one JSON object.

For each program of the run (phases with a shape or rows of their own): bytes a device against its
limit, collectives with the bytes that each device sends, and a roofline: the time of its FLOPs at
the peak, of its memory traffic (what it works on, written and read once) and of its collectives,
none of which overlap. Exit code 1 where something does not fit, with what to change, compiled to be
sure of it.
"""
import contextlib
import importlib.metadata
import io
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from data import HELD_OUT, Document, batch_lengths
from lib.arguments import Arguments
from lib.banner import grid
from lib.bind import bind
from lib.disk import cache_home
from lib.errors import InputError, user_errors
from lib.hardware import hardware
from lib.kernels import choose
from lib.masks import Mask
from lib.objectives import declared_masks, objective_of, stack
from lib.optim import state_like
from lib.packing import BOUNDS
from lib.schedule import make_plan
from lib.sharding import MeshConfig, by_row, make_mesh
from lib.tokenizers import Bytes
from model import Context, ModelConfig, count, groups
from train import ROOT, Config, bounded, check, compile_step, load, parse

# What XLA asks of a GPU that is not here besides lib/hardware.py, from the makers' sheets and XLA's
# own list of them: name, multiprocessors, float32 units of each, its shared memory, its threads,
# bytes of the second cache, GHz.
GPUS = {"a100": ("NVIDIA A100", 108, 64, 167_936, 2048, 41_943_040, 1.41),
        "h100": ("NVIDIA H100", 132, 128, 233_472, 2048, 52_428_800, 1.98),
        "h200": ("NVIDIA H200", 132, 128, 233_472, 2048, 62_914_560, 1.98),
        "b200": ("NVIDIA B200", 148, 128, 233_472, 2048, 132_644_864, 1.965),
        "a10": ("NVIDIA A10", 72, 128, 102_400, 1536, 6_291_456, 1.695),
        "l4": ("NVIDIA L4", 58, 128, 102_400, 1536, 50_331_648, 2.04),
        "rtx4090": ("NVIDIA GeForce RTX 4090", 128, 128, 102_400, 1536, 75_497_472, 2.52),
        "t4": ("Tesla T4", 40, 64, 65_536, 1024, 4_194_304, 1.59)}
TPUS = "v4", "v5e", "v5p", "v6e", "tpu7x"
COLLECTIVES = "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute"
CUDNN = 91_000  # the version of cuDNN that GPUs which are not here are said to have
REMAT = "none", "elementwise", "all"  # what is computed again: nothing, some, all
WIDTH = {  # bytes; others have 4
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "f16": 2,
    "bf16": 2,
    "s16": 2,
    "u16": 2,
    "f64": 8,
    "s64": 8,
    "u64": 8,
}


class Program(NamedTuple):
    """What is known of one compiled step."""

    phase: int
    attention: str  # how it is computed
    parameters: int
    batch: tuple[int, int]  # rows and their length
    fits: bool
    bytes: dict[str, int]  # on a device: state, batch, work, code, total, limit (0: not known)
    collectives: dict[str, list[int]]  # how many, bytes that a device sends
    seconds: dict[str, float]  # flops, memory, network; empty where the hardware is not known
    flops: float  # model FLOPs of the step
    compile_s: float


# ------------------------------------------------------------------------------------- collectives


def sizes(text: str) -> list[int]:
    """Bytes of each array in an HLO shape, say `(f32[2,3]{1,0}, bf16[4])`."""
    found = []
    for kind, dims in re.findall(r"([a-z]+\d+|pred)\[([\d,]*)\]", text):
        shape = [int(n) for n in dims.split(",") if n]
        found.append(math.prod(shape) * WIDTH.get(kind, 4))
    return found


def group(line: str, devices: int) -> int:
    """How many devices a collective's line joins, by any way that HLO writes its replica groups."""
    named = re.search(r"replica_groups=mesh\[(.*?)\](?: \{(.*?)\})?", line)
    if named and not named[2]:
        return devices
    if named:
        axes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", named[1])}
        return math.prod(axes[name] for name in re.findall(r"'(\w+)'", named[2]))
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]", line)
    if iota:
        return int(iota[2])
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
    return len(listed[1].split(",")) if listed else devices


def computations(text: str) -> tuple[dict[str, list[str]], str | None]:
    """({computation: its lines}, the name of the first to run) of an HLO module."""
    bodies = {}
    name = entry = None
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if head:
            name = head[2]
            bodies[name] = []
            if head[1]:
                entry = name
        elif name and line.startswith("  "):
            bodies[name].append(line)
    return bodies, entry


def sent_by(line: str, devices: int) -> tuple[str, float] | None:
    """(the kind of a collective, bytes that a device sends) of a line; None where there is none.

    By rings: an all-reduce of n bytes among k devices sends 2 n (k - 1) / k, the others n (k - 1) /
    k. n is the larger of what goes in and what comes out.
    """
    op = re.search(r" ([a-z\-]+)\(", line.split("metadata=")[0])
    if not op:
        return None
    kind = op[1].removesuffix("-start")
    if kind not in COLLECTIVES:
        return None
    starts = op[1].endswith("-start")  # its shape has what goes in and what comes out
    k = group(line, devices)
    moved = sizes(line[:op.start()].split(" = ", 1)[1])
    n = max(moved) if starts else sum(moved)
    if kind == "reduce-scatter" and not starts:
        n *= k
    factor = (k - 1) / k
    if kind == "all-reduce":
        factor = 2 * (k - 1) / k
    elif kind == "collective-permute":
        factor = 1
    return kind, n * factor


def turns(line: str, condition: list[str]) -> int:
    """How often a loop turns, from its line or from the lines of its condition."""
    known = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
    if known:
        return int(known[1])
    bounds = re.findall(r"s32\[\]\S* constant\((\d+)\)", "".join(condition))
    return max(map(int, bounds), default=1)


def collectives(text: str, devices: int) -> dict[str, list[int]]:
    """{collective: [how many, bytes that a device sends]} of a compiled module.

    Where XLA fuses a collective with what it overlaps, it repeats the line, with the same channel
    and attributes, in the computations of its start and of its end. It is counted once. Elsewhere
    a channel says nothing: all that are written by hand have the same.
    """
    bodies, entry = computations(text)
    found = {}
    seen = set()

    def visit(name: str, times: int, fused: bool = False):
        for line in bodies.get(name, ()):
            sent = sent_by(line, devices)
            if sent and fused and "channel_id=" in line:
                known = *sent, *re.findall(r"channel_id=\d+|frontend_attributes=\{.*?\}", line)
                if known in seen:
                    continue
                seen.add(known)
            if sent:
                kind, size = sent
                total = found.setdefault(kind, [0, 0])
                total[0] += times
                total[1] += round(times * size)
            loop = re.search(r"condition=%?([\w.\-]+), body=%?([\w.\-]+)", line)
            if loop:
                visit(loop[2], times * turns(line, bodies[loop[1]]))
                continue
            for called in re.findall(r"(?:calls|called_computations)=\{?%?([\w.\-]+)", line):
                visit(called, times, fused=True)

    visit(entry, 1)
    return found


# ---------------------------------------------------------------------------------------- hardware


def gpus(kind: str, hosts: int, each: int) -> list:
    """GPUs of hosts that are not here, so many of each, to compile for; kind: of GPUS."""
    name, cores, units, shared, threads, cache, clock = GPUS[kind]
    known = hardware(name)
    major, minor = known.capability
    size = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 49_152,
        "shared_memory_per_core": shared,
        "shared_memory_per_block_optin": shared - 1024,
        "threads_per_core_limit": threads,
        "core_count": cores,
        "fpus_per_core": units,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 65_535,
        "block_dim_limit_z": 65_535,
        "memory_bandwidth": int(known.memory_gb_s * 1e9),
        "l2_cache_size": cache,
        "clock_rate_ghz": clock,
        "device_memory_size": known.memory_gib * 2**30,
        "registers_per_core_limit": 65_536,
        "registers_per_block_limit": 65_536,
    }
    fields = " ".join(f"{field}: {value}" for field, value in size.items())
    target = (
        f"gpu_device_info {{ {fields} "
        f"cuda_compute_capability {{ major: {major} minor: {minor} }} }} "
        'platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 } '
        f'runtime_version {{ major: 13 }} device_description_str: "{name}"'
    )
    believe(known.capability)
    there = topologies.get_topology_desc(
        platform="cuda", target_config=target, topology=f"1x{hosts}x{each}"
    )
    return there.devices


def believe(capability: tuple[int, int]):
    """Let jax's wrapper of cuDNN take the GPUs that are compiled for for those that are here.

    It asks the devices of this process whether they can, of which none is a GPU.
    """
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    def least(wanted: str) -> bool:
        return capability >= tuple(int(part) for part in wanted.split("."))

    def equal(wanted: str) -> bool:
        return capability == tuple(int(part) for part in wanted.split("."))

    cudnn.check_compute_capability = least
    cudnn.is_cuda_compute_capability_equal = equal
    cudnn.check_cudnn_version = lambda: CUDNN


def gpu_grid(topology: str) -> tuple[int, int]:
    """(hosts, GPUs of each) of h100:8 or h100:4x8. Raises InputError for anything else."""
    kind, _, size = topology.partition(":")
    sizes = re.fullmatch(r"(?:(\d+)x)?([1-8])", size)
    if not sizes or sizes[1] == "0":
        raise InputError(
            f"--topology is {topology!r}; allowed for GPUs is {kind}:1 to {kind}:8 for those of "
            f"one host, {kind}:4x8 for four hosts of eight"
        )
    return int(sizes[1] or 1), int(sizes[2])


def wanted_devices(topology: str | None, devices: int) -> list:
    """The devices to compile for: so many of those here, or those of a topology."""
    if devices:
        jax.config.update("jax_num_cpu_devices", devices)  # no effect on other platforms
        return jax.devices()[:devices]
    kind = topology.partition(":")[0]
    if kind in GPUS:
        return gpus(kind, *gpu_grid(topology))
    return topologies.get_topology_desc(topology, platform="tpu").devices


def memory_limit(kind: str) -> int:
    """Bytes of a device that a run may take; 0 where its kind is not known."""
    known = hardware(kind)
    gib = known.memory_gib
    if known.capability > (0, 0):  # a GPU, of which JAX takes a share
        gib *= float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", 0.75))
    return round(gib * 2**30)


# ---------------------------------------------------------------------------------------- programs


def rows_like(phase, sources: dict, seq: int, mesh) -> tuple[dict, Mask]:
    """(shapes of a batch's arrays on a mesh, its mask), as the objectives of the sources make them.

    They are told of a document without text, and the tokenizer of bytes.
    """
    zeros = np.zeros(seq, np.int32)
    plain = {
        "tokens": zeros,
        "targets": zeros,
        "segments": zeros + 1,
        "positions": np.arange(seq, dtype=np.int32),
        "weights": np.ones(seq, np.float32),
        "source": zeros,
    }
    if any(source.marks for source in sources.values()):
        plain["marks"] = zeros
    given = dict(tokenizer=Bytes(), progress=0.0, log=[], document=Document("fit", ""))
    drawn = [name for name, source in sources.items() if source.split not in HELD_OUT]
    made, objectives = {}, [objective_of(phase.objective, name) for name in drawn]
    for i, objective in enumerate(objectives):
        made[i] = bind(objective, **given)(dict(plain), np.random.default_rng(0))
    arrays, mask = stack(made, np.array([0]), declared_masks(objectives), "the objective")
    row = {name: x[0] for name, x in arrays.items()}
    rows = phase.batch * phase.seq // seq
    where = by_row(mesh, rows)
    shapes = {}
    for name, x in row.items():
        shapes[name] = jax.ShapeDtypeStruct((rows, *x.shape), x.dtype, sharding=where)
    return shapes, Mask(**mask)


def refused(error: Exception) -> dict[str, int] | None:
    """Bytes asked for and their limit, from a compiler's sentence about what does not fit."""
    used = re.search(r"(?:Used |required[^(]*\()([\d.]+)([GM])\D+([\d.]+)([GM])", str(error))
    if not used:
        return None
    unit = {"G": 2**30, "M": 2**20}
    total = round(float(used[1]) * unit[used[2]])
    limit = round(float(used[3]) * unit[used[4]])
    return {"total": total, "limit": limit}


def held_bytes(step, like, limit: int) -> dict[str, int]:
    """What a compiled step takes of a device, see `Program.bytes`; like: the state's shapes."""
    memory = step.memory_analysis()
    state = 0
    for x in jax.tree.leaves(like):
        state += math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    work = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    size = {
        "state": state,
        "batch": memory.argument_size_in_bytes - state,
        "work": work,
        "code": memory.generated_code_size_in_bytes,
    }
    return size | {"total": sum(size.values()), "limit": limit}


def roofline(kind: str, hosts: int, flops: float, total: int, sent: dict) -> dict[str, float]:
    """Seconds that a device's FLOPs, memory traffic and network take; empty for an unknown kind."""
    known = hardware(kind)
    if not known.memory_gib:
        return {}
    network = sum(size for _, size in sent.values())
    speed = known.network_gb_s
    if hosts > 1 and known.hosts_gb_s:  # a ring passes between them
        speed = known.hosts_gb_s
    return {
        "flops": flops / known.peak,
        "memory": 2 * total / known.memory_gb_s / 1e9,  # written and read once
        "network": network / speed / 1e9,
    }


def inspect(
    config: Config,
    mesh,
    phase: int,
    shape: ModelConfig,
    seq: int,
    frozen: frozenset[str],
    segments: int,
) -> Program:
    """Compile one step of a phase for a mesh; frozen: optimiser groups at rate 0."""
    p = config.phases[phase]
    like = state_like(shape, config.optimizer, mesh)
    arrays, mask = rows_like(p, config.data.sources, seq, mesh)
    mask = bounded(mask, segments, shape)
    whole = NamedSharding(mesh, PartitionSpec())
    lr = {g: jax.ShapeDtypeStruct((), jnp.float32, sharding=whole) for g in groups(shape)}
    kind, devices = mesh.devices.flat[0].device_kind, mesh.devices.size
    tokens = p.batch * p.seq
    with jax.set_mesh(mesh), user_errors():
        attention = choose(shape.attention, mask, seq, shape.head_dim, shape.dtype)
    known = {
        "phase": phase,
        "attention": attention,
        "parameters": count(shape),
        "batch": (tokens // seq, seq),
        "flops": float(tokens * shape.flops(shape, seq)),
    }
    begun = time.perf_counter()
    try:
        step = compile_step(config, shape, mesh, like, arrays, lr, mask, p, frozen)
    except jax.errors.JaxRuntimeError as error:  # the TPU's compiler refuses what does not fit
        size = refused(error)
        if not size:
            raise
        compile_s = time.perf_counter() - begun
        nothing = {"collectives": {}, "seconds": {}}
        return Program(**known, **nothing, fits=False, bytes=size, compile_s=compile_s)
    compile_s = time.perf_counter() - begun
    size = held_bytes(step, like, memory_limit(kind))
    sent = collectives(step.as_text(), devices)
    hosts = len({device.process_index for device in mesh.devices.flat})
    seconds = roofline(kind, hosts, known["flops"] / devices, size["total"], sent)
    fits = not size["limit"] or size["total"] <= size["limit"]
    more = {"bytes": size, "collectives": sent, "seconds": seconds}
    return Program(**known, **more, fits=fits, compile_s=compile_s)


def programs(config: Config, mesh, segments: int) -> Iterator[Program]:
    """Every program that a run takes on a mesh, with rows of so many segments at most."""
    context = Context(jax.random.key(0), 0, None, lambda n: [], load)
    seen = set()
    with user_errors():
        plan = make_plan(config, context)
        for i, (phase, shape) in enumerate(zip(config.phases, plan.models, strict=True)):
            frozen = plan.frozen(i)
            tokens = phase.batch * phase.seq
            for seq in batch_lengths(phase)[0]:
                how = phase.accumulate, str(phase.objective), phase.token_loss, phase.reduce
                key = shape, tokens, seq, how, frozen
                if key not in seen:
                    yield inspect(config, mesh, i, shape, seq, frozen, segments)
                seen.add(key)


def changes(config: Config, devices: int) -> Iterator[tuple[Config, str]]:
    """(config, its flags) of what makes a run smaller on a device, each on top of the last.

    Parameters split over all devices, activations computed again, batches taken in parts.
    """
    flags = ""
    if config.mesh.fsdp != devices and config.model.embed % devices == 0:
        flags = f"--mesh.data 1 --mesh.fsdp {devices} "
        config = replace(config, mesh=MeshConfig(data=1, fsdp=devices))
        yield config, flags.strip()
    stronger = REMAT[REMAT.index(config.model.remat) + 1:]
    for remat in stronger:
        config = replace(config, model=replace(config.model, remat=remat))
        yield config, f"{flags}--model.remat {remat}"
    flags += f"--model.remat {config.model.remat} "
    while all(p.batch % (2 * p.accumulate * devices) == 0 for p in config.phases):
        phases = [replace(p, accumulate=2 * p.accumulate) for p in config.phases]
        config = replace(config, phases=tuple(phases))
        parts = [f"--phases.{i}.accumulate {p.accumulate}" for i, p in enumerate(phases)]
        yield config, flags + " ".join(parts)


# ------------------------------------------------------------------------------------- the command


def show(p: Program):
    """Print what is known of a program."""
    gib = {name: size / 2**30 for name, size in p.bytes.items()}
    total, limit = gib.pop("total"), gib.pop("limit")
    rows, seq = p.batch
    print(f"phase {p.phase}: {p.parameters:,} parameters, {rows} rows of {seq}, ", end="")
    print(f"attention {p.attention}; ", end="")
    print(f"compiled in {p.compile_s:.0f} s")
    memory = f"{total:.2f}"
    if limit:
        memory += f" of {limit:.1f}"
    memory += " GiB a device"
    if gib:
        memory += ": " + ", ".join(f"{name} {size:.2f}" for name, size in gib.items())
    if not p.fits:
        memory += " - DOES NOT FIT"
    print(f"  memory      {memory}")
    for kind, (n, sent) in p.collectives.items():
        print(f"  {kind:<19} {n:>5} times, {sent / 2**20:,.1f} MiB sent by a device")
    if p.seconds:
        slowest = max(p.seconds, key=p.seconds.get)
        each = ", ".join(f"{name} {1e3 * s:.2f}" for name, s in p.seconds.items())
        mfu = p.seconds["flops"] / sum(p.seconds.values())
        print(
            f"  roofline    {each} ms: a step takes {1e3 * p.seconds[slowest]:.2f} ms or more, "
            f"bound by {slowest}; one after the other, {mfu:.0%} MFU"
        )


def advise(config: Config, devices: list, segments: int) -> str | None:
    """Flags with which a run fits, tried out and printed; None where none of them is enough."""
    for changed, flags in changes(config, len(devices)):
        trial = list(programs(changed, make_mesh(changed.mesh, devices), segments))
        worst = max(p.bytes["total"] for p in trial) / 2**30
        fits = all(p.fits for p in trial)
        verdict = "" if fits else ", too much still"
        print(f"with {flags}: {worst:.2f} GiB{verdict}")
        if fits:
            print(f"it fits with {flags}")
            return flags
    print("use more devices, a smaller model or a smaller batch")
    return None


def here(a, config: Config) -> int:
    """In a process of its own: compile and print; returns 1 where something does not fit."""
    devices = wanted_devices(a.topology, a.devices)
    with user_errors():
        mesh = make_mesh(config.mesh, devices)
    found = list(programs(config, mesh, a.segments))
    print(grid(devices, mesh))
    for program in found:
        show(program)
    fits = all(p.fits for p in found)
    advice = None
    if not fits:
        advice = advise(config, devices, a.segments)
    if a.json:
        result = {
            "fits": fits,
            "devices": len(devices),
            "kind": devices[0].device_kind,
            "mesh": dict(mesh.shape),
            "advice": advice,
            "programs": [p._asdict() for p in found],
        }
        print(json.dumps(result))
    return 0 if fits else 1


def gpu_compiler(topology: str) -> dict[str, str]:
    """`compiler` for GPUs."""
    gpu_grid(topology)
    place = Path(os.environ.get("CUDA_PLUGIN_PATH") or cache_home() / "cuda")
    if not (place / "jax_plugins").is_dir():
        raise InputError(
            f"fit: --topology {topology} needs {place}; get it by pip install --target {place} "
            f"'jax-cuda13-plugin[with-cuda]=={jax.__version__}'"
        )
    paths = [str(place)]
    if os.environ.get("PYTHONPATH"):
        paths.append(os.environ["PYTHONPATH"])
    return {"PYTHONPATH": os.pathsep.join(paths)}


def compiler(topology: str) -> dict[str, str]:
    """Environment variables by which a process finds the compiler for hardware that is not here.

    Raises InputError with the command that gets it, where it is absent.
    """
    kind = topology.partition(":")[0]
    if kind in GPUS:
        return gpu_compiler(topology)
    if kind not in TPUS:
        known = ", ".join([*TPUS, *GPUS])
        raise InputError(f"--topology is {topology!r}; allowed kinds of devices are {known}")
    library = os.environ.get("TPU_LIBRARY_PATH") or cache_home() / "libtpu/libtpu/libtpu.so"
    if not os.path.exists(library):
        needs = importlib.metadata.requires("jax")
        line = next(line for line in needs if line.startswith("libtpu"))
        version = re.match("libtpu[^;]*", line)[0].strip()  # another may not understand this jax
        raise InputError(
            f"fit: --topology needs {library}; get it by pip install --target "
            f"{cache_home() / 'libtpu'} '{version}'"
        )
    return {"TPU_LIBRARY_PATH": str(library), "TPU_SKIP_MDS_QUERY": "1"}


def with_vocabulary(config: Config, parser: Arguments) -> Config:
    """The config with its tokenizer's number of pieces, where that is known without reading it."""
    if config.model.vocab:
        return config
    if config.data.tokenizer != "bytes":
        parser.error("model.vocab is 0; allowed is 1 and more, since no tokenizer is read")
    return replace(config, model=replace(config.model, vocab=Bytes.vocab))


def main(arguments: list[str]) -> int:
    """Command line; returns the exit code."""
    parser = Arguments("fit", __doc__)
    add = parser.add_argument
    add("--topology", help="TPU chips, like v5e:4x4, or GPUs, like h100:8")
    add("--devices", type=int, default=0, help="how many of what is here")
    add("--segments", type=int, choices=BOUNDS, default=BOUNDS[1], help="of a row at most")
    add("--json", action="store_true", help="end with one JSON object")
    a, rest = parser.parse_known_args(arguments)
    if bool(a.topology) == bool(a.devices) or a.devices < 0:
        parser.error("allowed is either --topology KIND:AxB or --devices N")
    again = "COPPICE_FIT" in os.environ
    quiet = contextlib.nullcontext() if again else contextlib.redirect_stdout(io.StringIO())
    with quiet:  # what a config says is said once
        config, _ = parse(rest)
    check(config)
    config = with_vocabulary(config, parser)
    if again:
        return here(a, config)
    where = {"COPPICE_FIT": "1"}
    if a.topology:
        where |= compiler(a.topology) | {"JAX_PLATFORMS": "cpu"}
    line = [sys.executable, ROOT / "train.py", "fit", *arguments]
    done = subprocess.run(line, env=os.environ | where, stderr=subprocess.PIPE, text=True)
    errors = "error:" in done.stderr or "Traceback" in done.stderr
    if errors or done.returncode not in (0, 1):
        lines = done.stderr.splitlines()
        named = [x for x in lines if x.startswith("error: ") or "Error" in x]
        last = named[-1].removeprefix("error: ") if named else done.stderr[-300:]
        raise InputError(f"fit: {last}")
    return done.returncode
