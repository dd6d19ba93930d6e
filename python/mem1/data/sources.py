"""Every data set that can be used here: its licence, where it comes from, and how its files are told."""

from __future__ import annotations

from typing import Literal, NamedTuple

Content = Literal["questions", "passages", "rows", "other"]
PUBLISHER = "the publisher's repository"
USERS = "several projects that have downloaded it"
HERE = "the copy that this project is tested on"
LOADER = "the metadata of the loader in Hugging Face's datasets"


class Digest(NamedTuple):
    """A version of a file that is known. size: in bytes. known_from: who has said so."""

    size: int
    sha256: str
    known_from: str


class DataFile(NamedTuple):
    """A file by its name. content: what it holds, "rows" of a form of their own, "other" what is not read.
    digests: of its known versions; none where no checksum is published.
    """

    name: str
    content: Content
    digests: tuple[Digest, ...] = ()


class DataSet(NamedTuple):
    """A data set. format: of its questions, as `mem1.envs.qa.question_files` names it; "" without questions.
    source: where its files are had. note: what else one has to know.
    """

    name: str
    title: str
    licence: str
    source: str
    files: tuple[DataFile, ...]
    format: str = ""
    note: str = ""


def data_sets() -> tuple[DataSet, ...]:
    """All data sets, those with questions first."""
    return _DATA_SETS


def data_set(name: str) -> DataSet | None:
    """The data set of that name, None if there is none."""
    return next((found for found in _DATA_SETS if found.name == name), None)


def _file(name: str, content: Content, *digests: Digest) -> DataFile:
    return DataFile(name, content, digests)


_DATA_SETS = (
    DataSet(
        "hotpotqa",
        "HotpotQA, distractor setting",
        "CC BY-SA 4.0",
        "http://curtis.ml.cmu.edu/datasets/hotpot/",
        (
            _file(
                "hotpot_train_v1.1.json",
                "questions",
                Digest(566426227, "26650cf50234ef5fb2e664ed70bbecdfd87815e6bffc257e068efea5cf7cd316", LOADER),
            ),
            _file(
                "hotpot_dev_distractor_v1.json",
                "questions",
                Digest(46320117, "4e9ecb5c8d3b719f624d66b60f8d56bf227f03914f5f0753d6fa1b359d7104ea", LOADER),
            ),
        ),
        "hotpotqa",
    ),
    DataSet(
        "nq-open",
        "Natural Questions, open-domain version",
        "CC BY-SA 3.0",
        "https://github.com/google-research-datasets/natural-questions/tree/master/nq_open",
        (
            _file(
                "NQ-open.train.jsonl",
                "questions",
                Digest(8522298, "0c93aaf13b12f855628489665e4ef85ffb8573ad444646f11f4fabdc57a0aabf", LOADER),
            ),
            _file(
                "NQ-open.dev.jsonl",
                "questions",
                Digest(391316, "f15567f38099f3615f5b8a685c0aef449c11ad90d3da3735e8d1b98115b40616", LOADER),
            ),
            _file("NQ-open.efficientqa.dev.1.1.jsonl", "questions"),
        ),
        "nq-open",
        "Has no passages: use a corpus of Wikipedia.",
    ),
    DataSet(
        "musique",
        "MuSiQue 1.0",
        "CC BY 4.0",
        "https://github.com/StonyBrookNLP/musique",
        (
            _file(
                "musique_v1.0.zip",
                "other",
                Digest(272049578, "98f839bf2fd5319f5c688aed77901a6d5c30b3b9f9f691ab9a8ecafb045ee0cd", USERS),
            ),
            _file(
                "musique_ans_v1.0_train.jsonl",
                "questions",
                Digest(241046755, "83a75b1e11e4e9bb8f8308e72ac40ca617ae4431b3a0d955b61cab259248490a", USERS),
            ),
            _file(
                "musique_ans_v1.0_dev.jsonl",
                "questions",
                Digest(30439728, "15fa63794d18a94ce12411aca6e2327e65b6e83b0b1490efab3f1962e48abf3b", USERS),
            ),
        ),
        "musique",
        "Its test sets have no answers. Single steps of dev and test questions occur in the training sets of "
        "SQuAD and Natural Questions.",
    ),
    DataSet(
        "2wiki",
        "2WikiMultihopQA, April 2021",
        "Apache-2.0",
        "https://github.com/Alab-NII/2wikimultihop",
        (
            _file(
                "data_ids_april7.zip",
                "other",
                Digest(258968175, "95df2bf56fdabe034e27aebc580e02264232203cf52552f9efe8a919e5529eef", USERS),
            ),
            _file(
                "train.json",
                "questions",
                Digest(707810660, "b318dbafbfed51a8029718fa59be8b616600cbff675a3b587694b28c5eedfc13", USERS),
            ),
            _file(
                "dev.json",
                "questions",
                Digest(57614142, "79f77ae104088ea8e25b1a65dbece768d45771194663bc5660ec9a98070dadf5", USERS),
            ),
        ),
        "2wiki",
        "Its test set has no answers. The other names of an answer, in id_aliases.json, are not read.",
    ),
    DataSet(
        "search-r1",
        "Natural Questions and HotpotQA as Search-R1 and MEM1 train on them",
        "not declared; of the questions CC BY-SA 3.0 and 4.0",
        "https://huggingface.co/datasets/PeterJinGo/nq_hotpotqa_train",
        (
            _file(
                "train.parquet",
                "questions",
                Digest(355663891, "c3cc21e862a8469105de666101578cbff23cdc77e91a803cef102622c89cc4f6", USERS),
            ),
            _file(
                "test.parquet",
                "questions",
                Digest(70370337, "30aa887b6d47e06e8c0f6f5307c88fe4e13461ac25a20ec0a5433ad7a4fe25dc", USERS),
            ),
        ),
        "search-r1",
        "Files of these names with several questions a row, as MEM1's scripts make them, are read as well; "
        "their checksums are not published.",
    ),
    DataSet(
        "qa",
        "Natural Questions, HotpotQA and MuSiQue with passages, this project's test data",
        "CC BY-SA 3.0 (Natural Questions), CC BY-SA 4.0 (HotpotQA), CC BY 4.0 (MuSiQue), Apache-2.0 "
        "(2WikiMultihopQA); passages of Wikipedia CC BY-SA",
        "selected for the tests of this project",
        (
            _file(
                "qa.jsonl",
                "questions",
                Digest(523557, "d9e341159df79c8d69132d67e36162a6a6689ae94506ae4d2c8fe454d3a953f5", HERE),
            ),
            _file(
                "corpus.jsonl",
                "passages",
                Digest(13180093, "9af85f0e97d5387db539c5bf2d622f1f6f7d73796319a92184f682f38b799e56", HERE),
            ),
        ),
        "qa",
        "2,955 questions, 12,584 passages. Files of these names that were converted have no known checksum.",
    ),
    DataSet(
        "wiki-18",
        "Wikipedia of December 2018 in passages of 100 words, the corpus of Search-R1 and MEM1",
        "not declared; text of Wikipedia, CC BY-SA",
        "https://huggingface.co/datasets/PeterJinGo/wiki-18-corpus",
        (
            _file(
                "wiki-18.jsonl.gz",
                "other",
                Digest(5123307260, "7abd929223399cd63c52b499f289bf4f9039be1e9f8c43e1cb3938305b2317db", USERS),
            ),
        ),
        note="14 GB unpacked, by tar: in spite of its name it is said to be an archive of one file.",
    ),
    DataSet(
        "webshop",
        "WebShop, 1,000 products",
        "MIT (products are public listings)",
        "https://github.com/princeton-nlp/WebShop (setup.sh -d small)",
        (
            _file(
                "items_shuffle_1000.json",
                "rows",
                Digest(4467013, "30a4765c3a327af72d9a9a95a6b2486d516f0fa1d3ecd83681901ce82a21b269", USERS),
                Digest(2743059, "4f6b25ff52b46bf6fdd809f777be0dd9f30b7a38998645b594ef954295786646", HERE),
            ),
            _file(
                "items_ins_v2_1000.json",
                "other",
                Digest(147099, "f88a36314a397b53b3d9c3fa5878e5f7b26d35019a51ec83fbedeca61a948f6f", USERS),
            ),
            _file(
                "human_goals.json",
                "other",
                Digest(999419, "b68746ed66cd31fdc5f70eb3f5831a46b38163563b57a66ddcab8fd60ee0cbdc", PUBLISHER),
            ),
        ),
    ),
)
