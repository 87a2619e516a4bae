"""Time transformers' generate on a Llama; the last line is one JSON object, as of `bench --generate`.

Give a directory that `train.py export` wrote, or a shape, whose weights are then random.
"""
import argparse
import json
import statistics
import time

import torch
import transformers

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("directory", nargs="?", help="of an exported model")
for name, default in dict(layers=6, embed=384, heads=6, mlp=1024, vocab=4096, batch=1, seq=32).items():
    parser.add_argument(f"--{name}", type=int, default=default)
parser.add_argument("--generate", type=int, default=128, help="tokens after a prompt of --seq")
parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy")
parser.add_argument("--seconds", type=float, default=10.0, help="how long to measure")
a = parser.parse_args()
torch.manual_seed(0)
if a.directory:
    model = transformers.LlamaForCausalLM.from_pretrained(a.directory, dtype=torch.float32)
else:
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        num_hidden_layers=a.layers, hidden_size=a.embed, num_attention_heads=a.heads, vocab_size=a.vocab,
        intermediate_size=a.mlp, tie_word_embeddings=True, max_position_embeddings=a.seq + a.generate))
model.eval()
model.generation_config = transformers.GenerationConfig(  # no end: each row is as long as it may be
    max_new_tokens=a.generate, do_sample=a.temperature > 0, pad_token_id=0,
    **(dict(temperature=a.temperature, top_k=0) if a.temperature else {}))
prompt = torch.randint(model.config.vocab_size, (a.batch, a.seq))
times, begun = [], time.perf_counter()
while len(times) < 4 or time.perf_counter() - begun < a.seconds:
    then = time.perf_counter()
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt))
    times.append(time.perf_counter() - then)
    assert out.shape == (a.batch, a.seq + a.generate)
ms = 1e3 * statistics.median(times[1:])  # the first warms up
print(json.dumps(dict(tokens_per_s=round(a.batch * a.generate / ms * 1e3, 1), ms=round(ms, 1),
                      runs=len(times) - 1, params=model.num_parameters(), threads=torch.get_num_threads(),
                      transformers=transformers.__version__, torch=torch.__version__)))
