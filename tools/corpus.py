"""The token cache and the tokenizer of a config, without training."""
import train


def main(arguments: list[str]):
    """Command line."""
    parser = train.Arguments("corpus", __doc__)
    parser.add_argument("what", choices=["build", "tokenizer"],
                        help="build: tokenizer and token cache; tokenizer: it alone")
    parser.add_argument("rest", nargs="*", metavar="CONFIG",
                        help="a config file and --path.to.field VALUE overrides")
    known, overrides = parser.parse_known_args(arguments)
    config, _ = train.parse([*known.rest, *overrides])
    train.check(config)
    if known.what == "tokenizer":
        tokenizer = train.data.make_tokenizer(config.data, config.model.vocab)
        print(f"tokenizer: {tokenizer.vocab} pieces")
        return
    config, tokenizer, caches = train.assemble(config)
    print(f"tokenizer: {tokenizer.vocab} pieces")
    for name, cache in caches.items():
        counts = ", ".join(f"{v:,} {k}" for k, v in cache.total["counts"].items())
        print(f"{name}: {cache.total['shards']} shards, {counts}; fingerprint {cache.fingerprint}")
        print(f"  {cache.directory}")
