"""Held-out bits per byte of a checkpoint, beside gzip and xz, and minimal pairs; writes RUN/eval.json."""
import gzip
import json
import lzma
import math
from pathlib import Path

import numpy as np

import data
import train


def compressed(texts: list[bytes]) -> dict[str, float]:
    """Bits per byte that gzip -9 and xz -9 need for texts, each compressed alone."""
    bits = {"gzip_bpb": lambda t: 8 * len(gzip.compress(t, 9)),
            "xz_bpb": lambda t: 8 * len(lzma.compress(t, preset=9))}
    return {name: sum(map(size, texts)) / sum(map(len, texts)) for name, size in bits.items()}


def minimal_pairs(folder: Path, losses, params, tokenizer) -> dict[str, float]:
    """Share of BLiMP pairs whose good sentence is the likelier, by paradigm, with its standard error."""
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        raise data.InputError(f"--blimp {str(folder)!r} holds no .jsonl file of minimal pairs")
    out = {}
    for file in files:
        pairs = [json.loads(line) for line in file.read_text("utf-8").split("\n") if line]
        texts = [p[k] for p in pairs for k in ("sentence_good", "sentence_bad")]
        ids = [np.array(tokenizer.encode(t), np.int32) for t in texts]
        plan = np.array([(i, 1, i, 0, len(x) + 1, 0) for i, x in enumerate(ids)])  # a row each
        seq = 1 << max(map(len, ids)).bit_length()
        total = []
        for start in range(0, len(ids), 64):
            arrays = data.fill(plan, np.arange(start, start + 64), seq, ids.__getitem__, tokenizer)
            del arrays["document"]
            total.append((np.asarray(losses(params, 0, arrays)) * arrays["weights"]).sum(1))
        nats = np.concatenate(total)[:len(ids)].reshape(-1, 2)
        right = float(np.mean(nats[:, 0] < nats[:, 1]))
        error = math.sqrt(right * (1 - right) / len(nats))
        out |= {f"blimp/{file.stem}": right, f"blimp/{file.stem}_se": error}
    scores = [v for k, v in out.items() if not k.endswith("_se")]
    return out | {"blimp": sum(scores) / len(scores)}


def main(arguments: list[str]) -> dict:
    """Command line; gives what eval.json holds."""
    parser = train.Arguments("eval", __doc__)
    parser.add_argument("run", help="run directory")
    parser.add_argument("--blimp", type=Path, help="directory of BLiMP paradigms, a .jsonl file each")
    parser.add_argument("--step", type=int, help="checkpoint; the newest by default")
    a = parser.parse_args(arguments)
    params, config, tokenizer, _ = train.load(a.run, a.step)
    phase, (losses, _) = config.phases[-1], train.evaluators(config, config.model)
    result, held = {}, {}
    if config.data.test:
        caches = {name: data.build(name, config.data, tokenizer, config.seed) for name in config.data.sources}
        held = {name: data.held_out(cache, "test", tokenizer, phase.seq, phase.batch, config.overlap)
                for name, cache in caches.items()}
        for name, h in held.items():
            found = data.bits_per_byte(lambda arrays: losses(params, 0, arrays), h)
            result |= {f"eval/{name}.test/{k}": v for k, v in found.items()}
        texts = [t for h in held.values() for t in h.texts()]
        result |= compressed(texts) | {"held_out_paths": [p for h in held.values() for p in h.paths]}
        for name, h in held.items():
            bpb, error = (result[f"eval/{name}.test/{k}"] for k in ("bpb", "bpb_se"))
            print(f"held-out {name}: {bpb:.3f} +- {error:.3f} bits per byte "
                  f"({len(h.paths)} documents, {h.bytes.sum():,} bytes)")
        print("the same documents, each compressed alone: "
              f"gzip -9 {result['gzip_bpb']:.3f}, xz -9 {result['xz_bpb']:.3f}")
    if a.blimp:
        result |= minimal_pairs(a.blimp, losses, params, tokenizer)
        shown = {k: v for k, v in result.items() if k.startswith("blimp") and not k.endswith("_se")}
        print("".join(f"{k}: {v:.3f}\n" for k, v in shown.items()))
    data.write(Path(a.run) / "eval.json", json.dumps(result, indent=1))
    return result
