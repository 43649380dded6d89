"""What weights in eight bits change in the answers of a checkpoint.

    python benchmarks/quantization.py --checkpoint=runs/tiny --records=DATA.jsonl --out=FILE.json

Each record's question is answered by the weights as they are and by the same in eight bits,
greedily. Reported are the share of right answers of each, the share of answers that are the same,
and the mean Kullback-Leibler divergence of the first token's distribution, in nats.
"""

import argparse
import json
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]


def answers(checkpoint: str, records: list, kind: str) -> list[tuple[str, bool, object]]:
    """Of each record: what is answered, whether it is right, and the first token's log-odds."""
    import jax
    import numpy as np

    from storm_jax import checkpoint as checkpoints
    from storm_jax.data import text, video
    from storm_jax.inference.cache import empty_cache
    from storm_jax.inference.engine import Engine
    from storm_jax.inference.load import load
    from storm_jax.inference.sampling import Sampling

    loaded = load(checkpoint, quantization=kind)
    config = loaded.config
    saved = checkpoints.find(checkpoint)[0].parent / "tokenizer"
    tokenizer = text.load_tokenizer(str(saved) if saved.is_dir() else config.data.tokenizer)
    template = config.data.chat_template
    wish = Sampling(max_new_tokens=32, stop_tokens=text.stop_tokens(tokenizer, template))
    context = config.data.sequence_length + 64
    engine, decoder = Engine(loaded, slots=1, context=context), loaded.decoder

    @jax.jit
    def first(weights, tokens, count, visual):
        cache = empty_cache(config.model.decoder, 1, context, decoder.dtype)
        scores, _ = decoder.prefill(weights, cache, 0, tokens, count, visual)
        return jax.nn.log_softmax(scores[0])

    results = []
    for record in records:
        frames, _ = video.sample(record.media[0], config.data.frames, config.model.vit.image_size)
        media = engine.encode(frames)
        *turns, answer = record.turns
        tokens = text.encode_prompt(tokenizer, template, turns, [media.count])
        padded = np.pad(tokens, (0, -len(tokens) % 128))
        with jax.set_mesh(loaded.mesh):
            scores = first(loaded.weights, padded, np.int32(len(tokens)), media.tokens)
        slot = engine.admit(tokens, [media], wish)
        made: list[int] = []
        while progress := engine.step():
            made += progress[0].tokens
        engine.release(slot)
        said = tokenizer.decode(made, skip_special_tokens=True).strip()
        results.append((said, said == answer.text.strip(), np.asarray(scores, np.float64)))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--records", required=True, help="in a format of docs/data.md")
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--out", default="")
    args = parser.parse_args()

    import numpy as np

    from storm_jax import checkpoint
    from storm_jax.config import SourceConfig
    from storm_jax.data.open_records import open_records

    (found,) = open_records(SourceConfig(path=args.records))
    records = [found.records[i] for i in range(min(args.limit, len(found.records)))]
    config = checkpoint.read_config(args.checkpoint)
    whole = answers(args.checkpoint, records, "")
    report: dict = {"run": config.name, "dtype": config.model.dtype, "records": len(records)}
    for kind in ("", "int8", "fp8", "fp8_dynamic"):
        results = answers(args.checkpoint, records, kind) if kind else whole
        pairs = list(zip(whole, results, strict=True))
        report[kind or "as saved"] = {
            "right": float(np.mean([right for _, right, _ in results])),
            "same answer": float(np.mean([a[0] == b[0] for a, b in pairs])),
            "divergence": float(np.mean([(np.exp(a[2]) * (a[2] - b[2])).sum() for a, b in pairs])),
        }
    print(json.dumps(report, indent=1))
    if args.out:
        pathlib.Path(args.out).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
