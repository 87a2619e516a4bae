"""Time the training step of a PyTorch model, alive between the rounds of `bench --against`.

    python tests/peer_train.py FILE [--compile] [--layers 6 --dim 384 --heads 6 --mlp 1024 ...]

FILE defines `Llama(a)`, a module (tokens, targets) -> loss whose shape is in a's attributes. It is
trained by fused AdamW, its gradient clipped at 1.0, on random tokens. See lib/live.py for what it
reads and says; --seconds, without that, for one measurement.
"""
import argparse
import contextlib
import importlib.util
import json
import os
import resource
import statistics
import sys
import time

import torch

SHAPE = {"layers": 6, "dim": 384, "heads": 6, "kv-heads": 0, "mlp": 1024, "vocab": 4096, "seq": 256,
         "batch": 16}
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"


def parse():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("file")
    for name, default in SHAPE.items():
        add(f"--{name}", type=int, default=default)
    add("--dtype", choices=["float32", "bfloat16"], default="float32")
    add("--compile", action="store_true")
    add("--tied", action="store_true")
    add("--seconds", type=float, default=10.0)
    found = parser.parse_args()
    found.kv_heads = found.kv_heads or found.heads
    return found


def stepper(a):
    """(a function that takes a step, the model)."""
    spec = importlib.util.spec_from_file_location("peer", a.file)
    peer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(peer)
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    model = peer.Llama(a).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1,
                                  fused=True)
    loss_of = torch.compile(model) if a.compile else model
    rows = torch.randint(0, a.vocab, (a.batch, a.seq + 1), device=DEVICE)
    rounded = contextlib.nullcontext()
    if a.dtype == "bfloat16":
        rounded = torch.autocast(DEVICE, torch.bfloat16)

    def step():
        with rounded:
            loss = loss_of(rows[:, :-1], rows[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if ON_GPU:
            torch.cuda.synchronize()

    return step, model


def peak_gib() -> float:
    """The most memory held: of the GPU, or of the process."""
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return round((torch.cuda.max_memory_allocated() if ON_GPU else held) / 2**30, 3)


def main():
    """Be ready, then measure as often as is asked, or once."""
    a = parse()
    step, model = stepper(a)
    begun = time.perf_counter()
    for _ in range(3):
        step()
    ready = {"compile_s": round(time.perf_counter() - begun, 2), "peer": f"torch {torch.__version__}",
             "params": sum(x.numel() for x in model.parameters()), "compiled": a.compile}

    def measure(seconds: float) -> dict:
        times = []
        begun = time.perf_counter()
        while len(times) < 5 or time.perf_counter() - begun < seconds:
            then = time.perf_counter()
            step()
            times.append(time.perf_counter() - then)
        ms = 1e3 * statistics.median(times)
        return {"tokens_per_s": round(a.batch * a.seq / ms * 1e3), "step_ms": round(ms, 2),
                "peak_gib": peak_gib()}

    if "COPPICE_LIVE" not in os.environ:
        print(json.dumps(ready | measure(a.seconds)))
        return
    print(json.dumps(ready), flush=True)
    for line in sys.stdin:
        print(json.dumps(measure(float(line))), flush=True)


if __name__ == "__main__":
    main()
