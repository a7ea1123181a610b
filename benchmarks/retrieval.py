"""online-prf, milliseconds per query, against plain re-ranking with the same re-ranker and the same k.

    .venv/bin/python benchmarks/retrieval.py                 # Vaswani where STILLHOUSE_DATA has it; about 10 minutes
    .venv/bin/python benchmarks/retrieval.py --quick         # few queries and small networks, to see that it works

Three sides take turns, query by query, in one process with one thread: plain re-ranking of the first k documents,
online-prf, and plain re-ranking of as many documents as online-prf looked at. A ratio is the median over the queries.
The cross-encoders have the shape of a published one and random weights: they cost what those cost, and rank nothing.
Run it on a quiet machine. The result is written to OUT/retrieval.json.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from common import table, write

import torch  # isort: skip

from threadpoolctl import threadpool_limits

from stillhouse.evaluate import environment
from stillhouse.recipes.online_prf import Config, distill_query
from stillhouse.recipes.online_prf.evaluation import PARTS
from stillhouse.recipes.online_prf.teachers import Latent
from stillhouse.retrieval import Collection, Reranker, Scores, SparseIndex, bm25, load_collection, load_reranker

SHAPES = {  # of BERT: layers, width, heads
    "cross-encoder, TinyBERT-2 shape (2 × 128)": (2, 128, 2),
    "cross-encoder, MiniLM-6 shape (6 × 384)": (6, 384, 12),
}


def cross_encoder(folder: Path, collection: Collection, layers: int, width: int, heads: int) -> Reranker:
    """A BERT cross-encoder with random weights over the collection's own words, loaded as a user would."""
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    words = sorted({w for t in collection.docs.values() for w in t.lower().split()})
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    torch.manual_seed(0)
    shape = {"num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads}
    config = BertConfig(vocab_size=len(words) + 5, intermediate_size=4 * width, num_labels=1, **shape)
    BertForSequenceClassification(config).save_pretrained(folder)
    BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=512).save_pretrained(folder)
    return load_reranker(f"hf:{folder}")


def rerankers(args: argparse.Namespace, collection: Collection, index: SparseIndex) -> Iterator[tuple[str, Reranker]]:
    yield "LSA + BM25", Latent(index)
    with tempfile.TemporaryDirectory() as home:
        for i, (name, shape) in enumerate(list(SHAPES.items())[: 1 if args.quick else None]):
            yield name, cross_encoder(Path(home) / str(i), collection, *shape)


def plain(query: str, index: SparseIndex, reranker: Reranker, k: int) -> None:
    docs = [d for d, _ in index.search(index.parse(query), k)]
    known = Scores(reranker)(query, docs, index)
    sorted(known.items(), key=lambda p: -p[1])


def clocked(do: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    result = do()
    return 1000 * (time.perf_counter() - began), result


def compare(name: str, index: SparseIndex, reranker: Reranker, queries: list[str], cfg: Config) -> dict[str, Any]:
    """Milliseconds of the three sides, and of the parts of online-prf; the first query warms up and is not counted."""
    rows: list[dict[str, float]] = []
    for i, query in enumerate([queries[0], *queries]):
        sides = ["plain", "prf"] if i % 2 else ["prf", "plain"]
        took: dict[str, float] = {}
        found: Any = None
        for side in sides:
            if side == "plain":
                took["plain"], _ = clocked(lambda q=query: plain(q, index, reranker, cfg.k))
            else:
                took["prf"], found = clocked(lambda q=query: distill_query(q, index, reranker, cfg))
        took["deeper"], _ = clocked(lambda q=query, n=found.calls: plain(q, index, reranker, n))
        took |= {part: 1000 * found.seconds[part] for part in PARTS} | {"calls": found.calls}
        rows.append(took)
    rows = rows[1:]
    middle = {key: statistics.median(r[key] for r in rows) for key in rows[0]}
    spread = {key: statistics.quantiles([r[key] for r in rows], n=10)[::8] for key in rows[0]}
    ratio = statistics.median(r["prf"] / r["plain"] for r in rows)
    equal = statistics.median(r["prf"] / r["deeper"] for r in rows)
    print(f"  {name}: {middle['plain']:.1f} → {middle['prf']:.1f} ms", flush=True)
    return {"re-ranker": name, "median": middle, "p10_p90": spread, "ratio": ratio, "ratio_equal_calls": equal}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="a collection (default: vaswani in STILLHOUSE_DATA, else descriptions)")
    parser.add_argument("--queries", type=int, default=30, help="how many queries")
    parser.add_argument("--k", type=int, default=100, help="documents of the first stage")
    parser.add_argument("--quick", action="store_true", help="5 queries, the small cross-encoder only")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"), help="folder for retrieval.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    there = (Path(os.environ.get("STILLHOUSE_DATA", "")) / "vaswani").is_dir() and "STILLHOUSE_DATA" in os.environ
    collection = load_collection(args.data or ("vaswani" if there else "descriptions"))
    index = bm25(collection.docs)
    cfg = Config(k=min(args.k, len(index) // 5))
    queries = list(collection.queries.values())[: 5 if args.quick else args.queries]
    print(f"{collection.name}: {len(index)} documents, {len(queries)} queries, k = {cfg.k}, one thread", flush=True)
    with threadpool_limits(1):
        results = [compare(name, index, r, queries, cfg) for name, r in rerankers(args, collection, index)]
    write(args.out / "retrieval.json", {"environment": environment(), "collection": collection.name, "k": cfg.k,
                                        "queries": len(queries), "results": results})  # fmt: skip
    columns = ["re-ranker", "plain, ms", "online-prf, ms", "ratio", "ratio at equal calls", "documents", "first stage",
               "re-ranking", "fit", "second stage", "re-ranking what is new"]  # fmt: skip
    rows = [
        [r["re-ranker"], *(f"{r['median'][k]:.1f}" for k in ("plain", "prf")), f"{r['ratio']:.2f}",
         f"{r['ratio_equal_calls']:.2f}", f"{r['median']['calls']:.0f}", *(f"{r['median'][p]:.1f}" for p in PARTS)]
        for r in results
    ]  # fmt: skip
    print(table(columns, rows))


if __name__ == "__main__":
    main()
