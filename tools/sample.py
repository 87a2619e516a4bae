"""Text from a run's checkpoint."""
import jax
import numpy as np

import model
import train


def continuation(params, config: train.Config, tokenizer, prompt: str, tokens: int, temperature: float,
                 seed: int, step: int) -> str:
    """A prompt's continuation, up to the end of the document or `tokens` tokens; step: of the checkpoint."""
    ids = [tokenizer.bos, *tokenizer.encode(prompt)]
    padded = np.full((1, max(32, 1 << (len(ids) - 1).bit_length())), tokenizer.eos, np.int32)
    padded[0, :len(ids)] = ids
    params = model.effective(config.weights, params, step, dict(tokens=padded))
    key = jax.random.key(seed)
    out = np.asarray(model.generate(params, padded, len(ids), tokens, temperature, key, config.model))[0]
    ended = np.flatnonzero(out == tokenizer.eos)
    return tokenizer.decode(out[:ended[0]] if len(ended) else out)


def main(arguments: list[str]) -> str:
    """Command line; gives the text that it prints."""
    parser = train.Arguments("sample", __doc__)
    parser.add_argument("run", help="run directory")
    parser.add_argument("--prompt", help="text to continue; the config's prompts by default")
    parser.add_argument("--tokens", type=int, help="how many at most; the config's by default")
    parser.add_argument("--temperature", type=float, help="0: the likeliest token; the config's by default")
    parser.add_argument("--step", type=int, help="checkpoint; the newest by default")
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    a = parser.parse_args(arguments)
    step = train.find(a.run, a.step)[1]
    params, config, tokenizer, _ = train.load(a.run, step)
    tokens = config.sample_tokens if a.tokens is None else a.tokens
    temperature = config.sample_temperature if a.temperature is None else a.temperature
    if tokens < 1 or temperature < 0:
        parser.error(f"--tokens is {tokens} and --temperature {temperature}; "
                     "allowed are 1 and more, and 0 and more")
    texts = [prompt + continuation(params, config, tokenizer, prompt, tokens, temperature, a.seed + i, step)
             for i, prompt in enumerate(config.prompts if a.prompt is None else [a.prompt])]
    text = "\n\n----\n\n".join(texts) + "\n"
    print(f"sample of {a.run}, temperature {temperature}:\n{text}", flush=True)
    return text
