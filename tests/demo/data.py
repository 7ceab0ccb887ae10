"""Input data of the demo, built without a network: docstrings of the standard library and synthetic reviews.

Run as ``python -m tests.demo.data OUT_DIR`` to write the rows as parquet files.
"""

import argparse
import ast
import random
import sysconfig
import warnings
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

Label = Literal["positive", "negative"]

# One seed per use. They differ modulo SPLITS, so no review occurs under two of them; see `reviews`.
SPLITS = 3
TRAINING_SEED = 0
HELD_OUT_SEED = 1
DEMO_SEED = 2

INPUT_SCHEMA = pa.schema(
    [
        pa.field("text", pa.string(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("name", pa.string(), nullable=False),
        pa.field("expected_label", pa.string()),
        pa.field("product", pa.string()),
    ]
)

# Distributions often leave the tests out, so reading them would make the row count depend on the machine.
TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})

PRODUCTS = (
    "backpack",
    "bicycle",
    "blender",
    "camera",
    "coffee maker",
    "desk lamp",
    "drill",
    "guitar",
    "headset",
    "kettle",
    "keyboard",
    "mattress",
    "microscope",
    "office chair",
    "phone",
    "printer",
    "telescope",
    "tent",
    "toaster",
    "vacuum cleaner",
)
ASPECTS = (
    "colour",
    "delivery",
    "design",
    "durability",
    "manual",
    "noise level",
    "packaging",
    "price",
    "size",
    "support",
    "warranty",
    "weight",
)
ADJECTIVES: dict[Label, tuple[str, ...]] = {
    "positive": (
        "brilliant",
        "excellent",
        "fantastic",
        "flawless",
        "great",
        "impressive",
        "perfect",
        "pleasant",
        "superb",
        "wonderful",
    ),
    "negative": (
        "awful",
        "bad",
        "disappointing",
        "dreadful",
        "horrible",
        "mediocre",
        "poor",
        "terrible",
        "unacceptable",
        "useless",
    ),
}
PHRASES: dict[Label, tuple[str, ...]] = {
    "positive": (
        "made me smile",
        "won me over",
        "exceeded my hopes",
        "is worth every cent",
        "gives me nothing to complain about",
    ),
    "negative": (
        "let me down",
        "made me angry",
        "ruined my weekend",
        "is a waste of money",
        "gives me plenty to complain about",
    ),
}
OPPOSITE: dict[Label, Label] = {"positive": "negative", "negative": "positive"}

OPENINGS = (
    "I bought this {product} {when}.",
    "I ordered the {product} {when}.",
    "My {person} gave me this {product} {when}.",
    "The {product} arrived {when}.",
    "This {product} replaced my old one {when}.",
    "Review of a {product} that I got {when}:",
    "We have used the {product} since we got it {when}.",
    "A {product} for my {person}, bought {when}.",
)
VERDICTS = (
    "The {aspect} is {adverb} {adjective}.",
    "I find the {aspect} {adverb} {adjective}.",
    "To my {person} the {aspect} is {adjective}.",
    "Its {aspect} turned out to be {adjective}.",
    "For me, the {aspect} is {adverb} {adjective}!",
    "The {aspect} {phrase}.",
    "After {number} days, the {aspect} {phrase}.",
)
NEGATED_VERDICTS = (
    "The {aspect} is not {opposite} at all.",
    "I would never call the {aspect} {opposite}.",
)
# Sentences that must not change an answer: they name other products and aspects.
ASIDES = (
    "I paid {number} euros.",
    "It came in a box with {number} stickers.",
    "My {person} wanted a {other_product} instead.",
    "I also looked at a {other_product} for {number} euros.",
    "I cannot say anything about the {other_aspect} yet.",
)
# The same with an opinion, which is not one of the product under review.
OTHER_OPINION = "My old {other_product} was {any_adjective}."
TIMES = ("last week", "last month", "in spring", "in autumn", "on Monday", "on Friday", "{number} days ago")
PEOPLE = ("brother", "sister", "father", "mother", "neighbour", "colleague", "friend", "aunt", "uncle")
ADVERBS = ("really", "simply", "quite", "just", "truly", "absolutely")


class Docstring(NamedTuple):
    """A docstring and the dotted name of what it documents."""

    name: str
    text: str


class Review(NamedTuple):
    """A product review and the answers that are right for it."""

    text: str
    label: Label
    product: str
    aspect: str


class _Row(NamedTuple):
    text: str
    kind: Literal["docstring", "review"]
    name: str
    expected_label: Label | None
    product: str | None


def standard_library_docstrings() -> Iterator[Docstring]:
    """Yield every docstring of the standard library, in the order of the source files.

    Docstrings are taken as written: indented, empty, very long or with unusual characters. Only lone
    surrogates, which no UTF-8 column can hold, are changed, each to U+FFFD.
    """
    root = Path(sysconfig.get_path("stdlib"))
    for path in _source_files(root):
        tree = _parse(path)
        if tree is not None:
            module = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
            yield from _docstrings(tree, module)


def reviews(count: int, seed: int) -> Iterator[Review]:
    """Yield `count` reviews, about half of them positive; the same seed gives the same reviews.

    The checksum of a text settles which seeds may give it: seeds that differ modulo SPLITS share no text.
    """
    rng = random.Random(seed)
    drawn = iter(lambda: _review(rng), None)
    mine = (review for review in drawn if zlib.crc32(review.text.encode()) % SPLITS == seed % SPLITS)
    return islice(mine, count)


def write_inputs(
    directory: Path,
    *,
    review_count: int = 4000,
    docstring_count: int | None = None,
    file_count: int = 4,
    seed: int = DEMO_SEED,
) -> list[Path]:
    """Write docstrings (all of them if `docstring_count` is None) and reviews, mixed, as parquet files."""
    rows = [
        _Row(text, "docstring", name, None, None)
        for name, text in islice(standard_library_docstrings(), docstring_count)
    ]
    rows += [
        _Row(review.text, "review", f"review-{number:06}", review.label, review.product)
        for number, review in enumerate(reviews(review_count, seed))
    ]
    random.Random(seed).shuffle(rows)
    directory.mkdir(parents=True, exist_ok=True)
    paths = [directory / f"part-{number}.parquet" for number in range(file_count)]
    for number, path in enumerate(paths):
        table = pa.Table.from_pylist([row._asdict() for row in rows[number::file_count]], INPUT_SCHEMA)
        pq.write_table(table, path)
    return paths


def _source_files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            # `site-packages` and the like are no identifiers, hence no packages of the standard library.
            if path.name.isidentifier() and path.name not in TEST_FOLDERS:
                yield from _source_files(path)
        elif path.suffix == ".py":
            yield path


def _parse(path: Path) -> ast.Module | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old sources have escapes that the compiler warns about
        try:
            return ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # lib2to3 ships Python 2 sources, for example
            return None


def _docstrings(node: ast.AST, name: str) -> Iterator[Docstring]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = ast.get_docstring(node, clean=False)
        if text is not None:
            yield Docstring(name, _without_surrogates(text))
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _docstrings(child, f"{name}.{child.name}")
        elif isinstance(child, ast.stmt | ast.ExceptHandler | ast.match_case):
            yield from _docstrings(child, name)


def _without_surrogates(text: str) -> str:
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _review(rng: random.Random) -> Review:
    label: Label = rng.choice(("positive", "negative"))
    product, other_product = rng.sample(PRODUCTS, 2)
    aspect, other_aspect = rng.sample(ASPECTS, 2)

    distractors = rng.sample(ASIDES, rng.randint(0, 2))
    if rng.random() < 0.08:
        distractors.append(OTHER_OPINION)
    sentences = [rng.choice(OPENINGS), rng.choice(NEGATED_VERDICTS if rng.random() < 0.1 else VERDICTS)]
    for distractor in distractors:
        sentences.insert(rng.randint(1, len(sentences)), distractor)
    # A time may itself hold a number, so it has to be in place before the other words are filled in.
    template = " ".join(sentences).replace("{when}", rng.choice(TIMES))
    text = template.format(
        product=product,
        other_product=other_product,
        aspect=aspect,
        other_aspect=other_aspect,
        adjective=rng.choice(ADJECTIVES[label]),
        opposite=rng.choice(ADJECTIVES[OPPOSITE[label]]),
        any_adjective=rng.choice(ADJECTIVES[rng.choice(("positive", "negative"))]),
        phrase=rng.choice(PHRASES[label]),
        adverb=rng.choice(ADVERBS),
        person=rng.choice(PEOPLE),
        number=rng.randint(2, 99),
    )
    return Review(text, label, product, aspect)


def main() -> None:
    """Write the input files into the folder named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path, metavar="OUT_DIR")
    parser.add_argument("--reviews", type=int, default=4000)
    parser.add_argument("--docstrings", type=int, help="only so many docstrings (default: all)")
    parser.add_argument("--files", type=int, default=4)
    options = parser.parse_args()
    paths = write_inputs(
        options.directory,
        review_count=options.reviews,
        docstring_count=options.docstrings,
        file_count=options.files,
    )
    rows = sum(pq.read_metadata(path).num_rows for path in paths)
    print(f"{rows} rows in {len(paths)} files in {options.directory}")


if __name__ == "__main__":
    main()
