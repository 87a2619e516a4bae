"""Time transformers' generate on a Llama.

The last line is one JSON object, as of `bench --generate`. Give a directory that `train.py export`
wrote, or a shape, whose weights are then random.
"""
import argparse
import json
import statistics
import time

import torch
import transformers

SHAPE = {"layers": 6, "embed": 384, "heads": 6, "mlp": 1024, "vocab": 4096, "batch": 1, "seq": 32}


def parse():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("directory", nargs="?", help="of an exported model")
    for name, default in SHAPE.items():
        add(f"--{name}", type=int, default=default)
    add("--generate", type=int, default=128, help="tokens after a prompt of --seq")
    add("--temperature", type=float, default=0.0, help="0: greedy")
    add("--seconds", type=float, default=10.0, help="how long to measure")
    return parser.parse_args()


def load(a):
    """The model of a directory, or a random one of a shape."""
    if a.directory:
        return transformers.LlamaForCausalLM.from_pretrained(a.directory, dtype=torch.float32)
    config = transformers.LlamaConfig(
        num_hidden_layers=a.layers,
        hidden_size=a.embed,
        num_attention_heads=a.heads,
        vocab_size=a.vocab,
        intermediate_size=a.mlp,
        tie_word_embeddings=True,
        max_position_embeddings=a.seq + a.generate,
    )
    return transformers.LlamaForCausalLM(config)


def how_to_generate(a) -> transformers.GenerationConfig:
    """Greedily, or from all tokens at a temperature.

    There is no end, so that each row is as long as it may be.
    """
    endless = {"max_new_tokens": a.generate, "pad_token_id": 0}
    if a.temperature > 0:
        drawn = {"do_sample": True, "temperature": a.temperature, "top_k": 0}
        return transformers.GenerationConfig(**endless, **drawn)
    return transformers.GenerationConfig(**endless, do_sample=False)


def times(a, model) -> list[float]:
    """Seconds of each generation but the first, which warms up; three at least."""
    prompt = torch.randint(model.config.vocab_size, (a.batch, a.seq))
    mask = torch.ones_like(prompt)
    found = []
    begun = time.perf_counter()
    while len(found) < 4 or time.perf_counter() - begun < a.seconds:
        then = time.perf_counter()
        out = model.generate(prompt, attention_mask=mask)
        found.append(time.perf_counter() - then)
        assert out.shape == (a.batch, a.seq + a.generate)
    return found[1:]


def main():
    """Print the figures."""
    a = parse()
    torch.manual_seed(0)
    model = load(a)
    model.eval()
    model.generation_config = how_to_generate(a)
    measured = times(a, model)
    ms = 1e3 * statistics.median(measured)
    row = {
        "tokens_per_s": round(a.batch * a.generate / ms * 1e3, 1),
        "ms": round(ms, 1),
        "runs": len(measured),
        "params": model.num_parameters(),
        "threads": torch.get_num_threads(),
        "transformers": transformers.__version__,
        "torch": torch.__version__,
    }
    print(json.dumps(row))


if __name__ == "__main__":
    main()
