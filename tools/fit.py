"""Does a run fit hardware that is not here? Its steps, compiled ahead of time, and what follows from them.

    python train.py fit CONFIG --topology v5e:4x4 [--json] [--path.to.field VALUE ...]
    python train.py fit CONFIG --topology h100:8 [--json] ...
    python train.py fit CONFIG --devices 8 [--json] ...

--topology: TPU chips (v4, v5e, v5p, v6e) by the TPU's own compiler, libtpu, of the version that jax asks for,
or GPUs of one host (a100, h100, h200, b200) by jax's CUDA plugin: without these, the command to get them is
said. They go to the cache directory, as beside jax they slow each start. A GPU's limit is the share of its
memory that jax takes: 3/4, or XLA_PYTHON_CLIENT_MEM_FRACTION.
--devices: so many of what is here; any number of CPUs. --json: the last line is one JSON object.

For each program of the run (phases with a shape or rows of their own): bytes a device against its limit,
collectives with the bytes that each device sends, and a roofline: the time of its FLOPs at the peak, of its
memory traffic (what it works on, written and read once) and of its collectives, none of which overlap. Exit
code 1 where something does not fit, with what to change, compiled to be sure of it.
"""
import importlib.metadata
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

from data import batch_lengths
from lib import schedule
from lib.arguments import Arguments
from lib.banner import grid
from lib.disk import cache_home
from lib.errors import InputError, user_errors
from lib.hardware import hardware
from lib.kernels import Mask
from lib.optim import state_like
from lib.sharding import MeshConfig, by_row, make_mesh
from model import Context, ModelConfig, count, flops_per_token, groups
from train import ROOT, Config, check, compile_step, load, parse

# What XLA asks of a GPU that is not here, from the makers' sheets and XLA's own list of them: name, compute
# capability, multiprocessors, float32 units of each, its shared memory, bytes of the second cache, GHz.
GPUS = {"a100": ("NVIDIA A100", 8, 108, 64, 167_936, 41_943_040, 1.41),
        "h100": ("NVIDIA H100", 9, 132, 128, 233_472, 52_428_800, 1.98),
        "h200": ("NVIDIA H200", 9, 132, 128, 233_472, 62_914_560, 1.98),
        "b200": ("NVIDIA B200", 10, 148, 128, 233_472, 132_644_864, 1.965)}
COLLECTIVES = "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute"
WIDTH = dict(pred=1, s8=1, u8=1, f16=2, bf16=2, s16=2, u16=2, f64=8, s64=8, u64=8)  # bytes; others have 4


class Program(NamedTuple):
    """What is known of one compiled step."""

    phase: int
    parameters: int
    batch: tuple[int, int]  # rows and their length
    fits: bool
    bytes: dict[str, int]  # on a device: state, batch, work, code, total, limit (0: not known)
    collectives: dict[str, list[int]]  # how many, bytes that a device sends
    seconds: dict[str, float]  # flops, memory, network; empty where the hardware is not known
    flops: float  # model FLOPs of the step
    compile_s: float


def sizes(text: str) -> list[int]:
    """Bytes of each array in an HLO shape, say `(f32[2,3]{1,0}, bf16[4])`."""
    return [math.prod(map(int, filter(None, dims.split(",")))) * WIDTH.get(kind, 4)
            for kind, dims in re.findall(r"([a-z]+\d+|pred)\[([\d,]*)\]", text)]


def group(line: str, devices: int) -> int:
    """How many devices a collective's line joins, by any way that HLO writes its replica groups."""
    if found := re.search(r"replica_groups=mesh\[(.*?)\](?: \{(.*?)\})?", line):
        axes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", found[1])}
        return math.prod(axes[name] for name in re.findall(r"'(\w+)'", found[2])) if found[2] else devices
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]", line):
        return int(found[2])
    found = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
    return len(found[1].split(",")) if found else devices


def collectives(text: str, devices: int) -> dict[str, list[int]]:
    """{collective: [how many, bytes that a device sends]} of a compiled module, its loops as often as they
    turn. By rings: an all-reduce of n bytes among k devices sends 2 n (k - 1) / k, the others n (k - 1) / k,
    where n is the larger of what goes in and what comes out.
    """
    bodies, name, entry = {}, None, None
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            name, entry = head[2], head[2] if head[1] else entry
            bodies[name] = []
        elif name and line.startswith("  "):
            bodies[name].append(line)
    out = {}

    def visit(name: str, times: int):
        for line in bodies.get(name, ()):
            op = re.search(r" ([a-z\-]+)\(", line.split("metadata=")[0])
            kind = op[1].removesuffix("-start") if op else ""
            if kind in COLLECTIVES:
                k, moved = group(line, devices), sizes(line[:op.start()].split(" = ", 1)[1])
                n = max(moved) if op[1].endswith("-start") else sum(moved)
                n = n * k if kind == "reduce-scatter" and not op[1].endswith("-start") else n
                share = {"all-reduce": 2 * (k - 1) / k, "collective-permute": 1}.get(kind, (k - 1) / k)
                one = out.setdefault(kind, [0, 0])
                one[0], one[1] = one[0] + times, one[1] + round(times * n * share)
            if loop := re.search(r"condition=%?([\w.\-]+), body=%?([\w.\-]+)", line):
                turns = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
                bound = re.findall(r"s32\[\]\S* constant\((\d+)\)", "".join(bodies[loop[1]]))
                visit(loop[2], times * (int(turns[1]) if turns else max(map(int, bound), default=1)))
            else:
                for called in re.findall(r"(?:calls|called_computations)=\{?%?([\w.\-]+)", line):
                    visit(called, times)

    visit(entry, 1)
    return out


def gpus(kind: str, count: int) -> list:
    """So many GPUs of one host that is not here, to compile for; kind: of GPUS."""
    name, capability, cores, units, shared, cache, clock = GPUS[kind]
    _, gib, fast, _ = hardware(name)
    size = dict(threads_per_block_limit=1024, threads_per_warp=32, shared_memory_per_block=49_152,
                shared_memory_per_core=shared, shared_memory_per_block_optin=shared - 1024,
                threads_per_core_limit=2048, core_count=cores, fpus_per_core=units,
                block_dim_limit_x=2**31 - 1, block_dim_limit_y=65_535, block_dim_limit_z=65_535,
                memory_bandwidth=int(fast * 1e9), l2_cache_size=cache, clock_rate_ghz=clock,
                device_memory_size=gib * 2**30, registers_per_core_limit=65_536,
                registers_per_block_limit=65_536)
    fields = " ".join(f"{k}: {v}" for k, v in size.items())
    target = (f"gpu_device_info {{ {fields} cuda_compute_capability {{ major: {capability} }} }} "
              f'platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }} '
              f'runtime_version {{ major: 13 }} device_description_str: "{name}"')
    there = topologies.get_topology_desc(platform="cuda", target_config=target, topology=f"1x1x{count}")
    return there.devices


def rows_like(phase, seq: int, mesh) -> tuple[dict, Mask]:
    """(shapes of a batch's arrays on a mesh, its mask): what the objective makes of a row of zeros."""
    zeros = np.zeros(seq, np.int32)
    plain = dict(tokens=zeros, targets=zeros, segments=zeros + 1, positions=np.arange(seq, dtype=np.int32),
                 weights=np.ones(seq, np.float32), source=zeros)
    row, mask = phase.objective(plain, np.random.default_rng(0))
    rows = phase.batch * phase.seq // seq
    return {k: jax.ShapeDtypeStruct((rows, *v.shape), v.dtype, sharding=by_row(mesh, rows))
            for k, v in row.items()}, Mask(**mask)


def inspect(config: Config, mesh, phase: int, shape: ModelConfig, seq: int) -> Program:
    """Compile one step of a phase for a mesh."""
    p, like = config.phases[phase], state_like(shape, config.optimizer, mesh)
    arrays, mask = rows_like(p, seq, mesh)
    whole = NamedSharding(mesh, PartitionSpec())
    rates = {g: jax.ShapeDtypeStruct((), jnp.float32, sharding=whole) for g in groups(shape)}
    kind, devices, begun = mesh.devices.flat[0].device_kind, mesh.devices.size, time.perf_counter()
    fastest, gib, fast, network = hardware(kind)
    gib *= float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", 0.75)) if kind.startswith("NVIDIA") else 1
    flops = float(p.batch * p.seq * flops_per_token(shape, seq))
    said = dict(phase=phase, parameters=count(shape), batch=(p.batch * p.seq // seq, seq), flops=flops)
    try:
        step = compile_step(config, shape, mesh, like, arrays, rates, mask, p.accumulate)
    except jax.errors.JaxRuntimeError as error:  # the TPU's compiler refuses what does not fit
        used = re.search(r"(?:Used |required[^(]*\()([\d.]+)([GM])\D+([\d.]+)([GM])", str(error))
        if not used:
            raise
        unit = dict(G=2**30, M=2**20)
        total, limit = round(float(used[1]) * unit[used[2]]), round(float(used[3]) * unit[used[4]])
        return Program(**said, fits=False, bytes=dict(total=total, limit=limit), collectives={}, seconds={},
                       compile_s=time.perf_counter() - begun)
    compile_s, memory = time.perf_counter() - begun, step.memory_analysis()
    held = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(like))
    work = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    size = dict(state=held, batch=memory.argument_size_in_bytes - held, work=work,
                code=memory.generated_code_size_in_bytes)
    size |= dict(total=sum(size.values()), limit=round(gib * 2**30))
    sent = collectives(step.as_text(), devices)
    seconds = dict(flops=flops / devices / fastest, memory=2 * size["total"] / fast / 1e9,
                   network=sum(n for _, n in sent.values()) / network / 1e9) if gib else {}
    return Program(**said, fits=not gib or size["total"] <= size["limit"], bytes=size, collectives=sent,
                   seconds=seconds, compile_s=compile_s)


def programs(config: Config, mesh) -> Iterator[Program]:
    """Every program that a run takes on a mesh."""
    context = Context(jax.random.key(0), 0, None, lambda n: [], load)
    with user_errors():
        shapes, seen = schedule.shapes(config, context), set()
        for i, (phase, shape) in enumerate(zip(config.phases, shapes, strict=True)):
            for seq in batch_lengths(phase)[0]:
                key = shape, phase.batch * phase.seq, seq, phase.accumulate, phase.objective
                if key not in seen:
                    yield inspect(config, mesh, i, shape, seq)
                seen.add(key)


def changes(config: Config, devices: int) -> Iterator[tuple[Config, str]]:
    """What makes a run smaller on a device, each on top of the last: parameters split over all, activations
    computed again, batches taken in parts."""
    said = ""
    if config.mesh.fsdp != devices and config.model.embed % devices == 0:
        mesh, said = MeshConfig(data=1, fsdp=devices), f"--mesh.data 1 --mesh.fsdp {devices}"
        yield (config := replace(config, mesh=mesh)), said
    for how in ("elementwise", "all")[("none", "elementwise", "all").index(config.model.remat):]:
        config = replace(config, model=replace(config.model, remat=how))
        yield config, f"{said} --model.remat {how}".strip()
    said = f"{said} --model.remat {config.model.remat}".strip()
    while all(p.batch % (2 * p.accumulate * devices) == 0 for p in config.phases):
        config = replace(config, phases=tuple(replace(p, accumulate=2 * p.accumulate) for p in config.phases))
        parts = " ".join(f"--phases.{i}.accumulate {p.accumulate}" for i, p in enumerate(config.phases))
        yield config, f"{said} {parts}".strip()


def show(p: Program):
    """Print what is known of a program."""
    gib = {k: v / 2**30 for k, v in p.bytes.items()}
    parts = ", ".join(f"{k} {v:.2f}" for k, v in gib.items() if k not in ("total", "limit"))
    limit = f" of {gib['limit']:.1f}" if gib["limit"] else ""
    print(f"phase {p.phase}: {p.parameters:,} parameters, {p.batch[0]} rows of {p.batch[1]}; compiled in "
          f"{p.compile_s:.0f} s\n  memory      {gib['total']:.2f}{limit} GiB a device" + (
              f": {parts}" if parts else "") + ("" if p.fits else " - DOES NOT FIT"))
    for kind, (n, sent) in p.collectives.items():
        print(f"  {kind:<19} {n:>5} times, {sent / 2**20:,.1f} MiB sent by a device")
    if p.seconds:
        slowest = max(p.seconds, key=p.seconds.get)
        each = ", ".join(f"{k} {1e3 * v:.2f}" for k, v in p.seconds.items())
        mfu = p.seconds["flops"] / sum(p.seconds.values())
        print(f"  roofline    {each} ms: a step takes {1e3 * p.seconds[slowest]:.2f} ms or more, bound by "
              f"{slowest}; one after the other, {mfu:.0%} MFU")


def here(a, config: Config) -> int:
    """In a process of its own: compile, print; 1 where something does not fit."""
    if a.devices:
        jax.config.update("jax_num_cpu_devices", a.devices)  # no effect on other platforms
        devices = jax.devices()[:a.devices]
    elif (kind := a.topology.partition(":"))[0] in GPUS:
        devices = gpus(kind[0], int(kind[2]))
    else:
        devices = topologies.get_topology_desc(a.topology, platform="tpu").devices
    with user_errors():
        mesh = make_mesh(config.mesh, devices)
    found = list(programs(config, mesh))
    print(grid(devices, mesh))
    for program in found:
        show(program)
    advice = None
    if not all(p.fits for p in found):
        for changed, said in changes(config, len(devices)):
            trial = list(programs(changed, make_mesh(changed.mesh, devices)))
            worst = max(p.bytes["total"] for p in trial) / 2**30
            good = all(p.fits for p in trial)
            print(f"with {said}: {worst:.2f} GiB" + ("" if good else ", too much still"))
            if good:
                advice = said
                break
        print(f"it fits with {advice}" if advice else "use more devices, a smaller model or a smaller batch")
    result = dict(fits=all(p.fits for p in found), devices=len(devices), kind=devices[0].device_kind,
                  mesh=dict(mesh.shape), advice=advice, programs=[p._asdict() for p in found])
    if a.json:
        print(json.dumps(result))
    return 0 if result["fits"] else 1


def compiler(topology: str) -> dict[str, str]:
    """Environment variables by which a process finds the compiler for hardware that is not here.

    Raises InputError with the command that gets it, where it is absent.
    """
    kind, _, size = topology.partition(":")
    if kind in GPUS:
        if not size.isdigit() or not 1 <= int(size) <= 8:
            raise InputError(f"--topology is {topology!r}; allowed for the GPUs of a host is {kind}:1 to "
                             f"{kind}:8")
        place = Path(os.environ.get("CUDA_PLUGIN_PATH") or cache_home() / "cuda")
        if not (place / "jax_plugins").is_dir():
            raise InputError(f"fit: --topology {topology} needs {place}; get it by pip install --target "
                             f"{place} 'jax-cuda13-plugin[with-cuda]=={jax.__version__}'")
        return {"PYTHONPATH": os.pathsep.join(filter(None, [str(place), os.environ.get("PYTHONPATH")]))}
    library = os.environ.get("TPU_LIBRARY_PATH") or cache_home() / "libtpu/libtpu/libtpu.so"
    if not os.path.exists(library):
        version = next(re.match("libtpu[^;]*", r)[0] for r in importlib.metadata.requires("jax")
                       if r.startswith("libtpu"))  # another one may not understand this jax
        raise InputError(f"fit: --topology needs {library}; get it by pip install --target "
                         f"{cache_home() / 'libtpu'} '{version.strip()}'")
    return {"TPU_LIBRARY_PATH": str(library), "TPU_SKIP_MDS_QUERY": "1"}


def main(arguments: list[str]) -> int:
    """Command line; gives the exit code."""
    parser = Arguments("fit", __doc__)
    parser.add_argument("--topology", help="TPU chips, like v5e:4x4, or GPUs, like h100:8")
    parser.add_argument("--devices", type=int, default=0, help="how many of what is here")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    a, rest = parser.parse_known_args(arguments)
    if bool(a.topology) == bool(a.devices) or a.devices < 0:
        parser.error("allowed is either --topology KIND:AxB or --devices N")
    config, _ = parse(rest)
    check(config)
    if not config.model.vocab:
        config = replace(config, model=replace(config.model, vocab=258)) if config.data.tokenizer == "bytes" \
            else parser.error("model.vocab is 0; allowed is 1 and more, since no tokenizer is read")
    if "COPPICE_FIT" in os.environ:
        return here(a, config)
    where = {"COPPICE_FIT": "1"}
    if a.topology:
        where |= compiler(a.topology) | {"JAX_PLATFORMS": "cpu"}
    line = [sys.executable, ROOT / "train.py", "fit", *arguments]
    done = subprocess.run(line, env=os.environ | where, stderr=subprocess.PIPE, text=True)
    if done.returncode not in (0, 1) or "error:" in done.stderr or "Traceback" in done.stderr:
        said = [x for x in done.stderr.splitlines() if x.startswith("error: ") or "Error" in x]
        raise InputError(f"fit: {said[-1].removeprefix('error: ') if said else done.stderr[-300:]}")
    return done.returncode
