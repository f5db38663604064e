"""The largest text at hand: the Python files of every installed package.

They are some 8,000 files, 150 million characters. Nothing is imported, and no link is followed. It
is also decided here which files are held out, so that no copy of one is ever trained on.
"""

import json
import re
import sysconfig
from pathlib import Path

import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from checkpoints.files import open_tensors, write_whole
from checkpoints.tokenizer import Tokenizer
from checkpoints.vocabulary import from_folder, learn, to_files
from train_exits import digest, encode, read_corpus, read_file
from train_exits import is_held_out as by_name

INSTALLED = "installed"  # the corpus of that name; its documents are site-packages/PACKAGE/...
HELD_OUT_PACKAGES = ("mpmath", "networkx", "rich")  # held out as a whole
VOCABULARY_SAMPLE = 8  # one document in this many is read to learn the vocabulary


def everything() -> dict[str, str]:
    """Name -> text, for the standard library and the installed packages."""
    return read_installed(read_corpus(None), Path(sysconfig.get_paths()["purelib"]))


def read_installed(
    documents: dict[str, str], site: Path, held_out_only: bool = False
) -> dict[str, str]:
    """`documents`, name -> text, together with the files of the packages in the folder `site`.

    Tests, tables, generated files, and copies of files already read are left out. Held-out files
    are read first, so that later copies of them are left out. held_out_only: read only these.
    """
    documents, found = dict(documents), {}
    for file in sorted(site.rglob("*.py")):
        place = Path("site-packages") / file.relative_to(site)
        wanted = not held_out_only or is_held_out(place.as_posix())
        if wanted and not {"test", "tests"} & set(place.parts) and not file.is_symlink():
            found[place.as_posix()] = file
    seen = {hash(line) for text in documents.values() for line in long_lines(text)}
    for name in sorted(found, key=lambda name: (not is_held_out(name), name)):
        text = read_file(found[name])
        if text is None:
            continue
        lines = {hash(line) for line in long_lines(text)}
        # a copy of a module, or one that differs from another in a few lines, teaches little
        if len(lines - seen) > len(lines) / 2 and not is_table(text):
            documents[name] = text
            seen |= lines
    return documents


def long_lines(text: str) -> set[str]:
    """Return the lines long enough to recognise a copy by, without surrounding white space."""
    return {line for raw in text.splitlines() if len(line := raw.strip()) > 12}


def is_table(text: str) -> bool:
    """Whether a module is a table or a program's output, rather than written by a person.

    It is if under 65 % of its visible characters are letters (as with numbers, escapes, columns of
    codes), if a line has over 400 characters, or if its beginning says that it was generated.
    """
    letters, visible = sum(map(str.isalpha, text)), len(text) - sum(map(str.isspace, text))
    widest = max(map(len, text.splitlines()), default=0)
    generated = re.search(r"(?i)generated (?:by|from|file|code)|do not edit", text[:1000])
    return letters < 0.65 * visible or widest > 400 or generated is not None


def installed_tokens(args, tokenizer: Tokenizer | None) -> tuple[Tokenizer, Tensor, Tensor]:
    """Return the tokenizer, learned if none is given, and tokens (T,) to train on and held out.

    They are kept in DIR/corpus, so that a resumed run starts at once and with the same text,
    whatever has been installed since. Raises ValueError if those kept have another vocabulary.
    """
    folder = args.out / "corpus"
    file = folder / "tokens.safetensors"
    kind = json.dumps({"model": args.model, "vocab": None if tokenizer else args.vocab})
    if args.rank == 0 and not file.exists():
        documents = everything()
        rest = [name for name in documents if not is_held_out(name)]
        cut = tokenizer is None
        if tokenizer is None:
            names = [n for n in rest if digest(n) % VOCABULARY_SAMPLE == 1]
            tokenizer = learn([documents[n] for n in names], args.vocab)
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in to_files(tokenizer).items():
            write_whole(folder / name, content)
        held = [text for name, text in documents.items() if is_held_out(name)]
        tensors = {"text": encode(tokenizer, [documents[n] for n in rest], cut)}
        tensors["held"] = encode(tokenizer, held)
        write_whole(file, lambda to: save_file(tensors, to, metadata={"kind": kind}))
    if args.world > 1:
        dist.barrier()
    with open_tensors(file) as saved:
        if (was := saved.metadata()["kind"]) != kind:
            said = "another --out reads the text afresh"
            raise ValueError(f"{folder} was made for {was}, asked is {kind}: {said}")
        text, held = saved.get_tensor("text"), saved.get_tensor("held")
    tokenizer = tokenizer or from_folder(folder, {}, args.vocab)
    assert tokenizer is not None  # written above
    return tokenizer, text, held


def is_held_out(name: str) -> bool:
    """Decide by a hash of the name, so that a file stays held out; some packages are as a whole."""
    if name.startswith("site-packages/") and Path(name).parts[1] in HELD_OUT_PACKAGES:
        return True
    return by_name(name)
