"""Difficult artifact paths: names with punctuation, names with percent signs, names in both Unicode normal forms, names
of compressed files, long paths and deep paths."""

from __future__ import annotations

import hashlib
import unicodedata


def nfd(text: str) -> str:
    return unicodedata.normalize("NFD", text)


MARKS = " !\"#$%&'()*+,;:<=>?@[]^`{|}~"
HARD = (
    "  two  spaces .txt/50%.csv/%/%%/%2/%zz.txt/a%20b.txt/%41.txt/%2e%2e.txt/100%25.csv/%2525.txt/%ff.bin/%00.bin/"
    "a%2Fb.txt/%C3%A9.txt/a+b c.txt/?x=1&y=2#z/a&amp;b.html/'; rm -rf ~; '.sh/$(id).txt/`id`.txt/${HOME}.txt/<b>.html/"
    "*/~root/a;b=c/a=b;filename=c.txt/[a-z]*.txt/{a,b}.txt/-rf/--help/.hidden/..x/x../.../a..b/a./..gz/.gz/. a/ ./"
    "é.txt/naïve plot.html/über.csv/日本語/한국어.csv/Ωmega.txt/Å.txt/\u212b.txt/ﬁ.txt/ß.txt/İ.txt/ı.txt/🙂.png/"
    "👩\u200d👧.png/\u202eexe.txt/\ufeffbom.txt/a\u00a0b.txt/a\u2028b.txt/a\u200bb.txt/\ufffd.txt/عربي.txt/हिन्दी.txt/"
    "\uff11\uff12.txt/…/“q”.txt/€.txt/a\tb.txt/a\nb.txt/a\rb.txt/a\x1bb.txt/a\x7fb.txt/a\x01b.txt/a\x85b.txt/"
    "table.csv.gz/rand.npy.gz/x.tar.gz/x.tgz/x.svgz/x.bz2/x.xz/x.Z/x.br/x.zst/x.GZ/x.csv.BZ2/x.taz/x.tbz2/gz/x.gz.gz/"
    "noending/x.html.br/MLmodel/index.html/a.svg/a.MD/models/artifacts?path=x/C:x.txt/CON/a:b:c/-1/null/data:,x/"
    "data:text;a,x/file:x/http:x/s3:x/mailto:a@b/runs:x/mlflow-artifacts:x/.artifact.uploading.x"
)
NAMES = [
    *(name for mark in MARKS for name in (f"a{mark}b.txt", f"{mark}a.txt", f"a.txt{mark}")),
    *HARD.split("/"),
    *map(nfd, ("é.txt", "über.csv", "한국어.csv", "Å.txt")),
    *("m-" + "0" * 32, "a" * 255, "é" * 127 + "a", "日" * 85, "a" * 251 + ".txt", "a" * 252 + ".gz"),
]
PATHS = [
    *dict.fromkeys(NAMES),
    *(f"{name}/{name}" for name in ("ü d%", "a+b c", "x.gz", "日本語", "..x", "50%", "it's", "é" * 100)),
    *("/".join([folder] * 20) + "/deep.txt" for folder in ("d", "ü d%", "a" * 40)),
    "/".join(["a" * 255] * 3) + "/x",
    "/".join(["a" * 100] * 20) + "/too long for S3",
    "models/m-" + "0123456789abcdef" * 2 + "/artifacts/x",
]
LONGEST_KEY = 1024


def content_of(path: str) -> bytes:
    """Return the content that a test stores at `path`."""
    return hashlib.sha256(path.encode()).hexdigest().encode() * 3
