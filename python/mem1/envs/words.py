"""The words of the worlds. One word is one token, so lengths in words are lengths in tokens."""

from __future__ import annotations

# Given names: the entities of the knowledge bases. An episode uses them in an order of its own.
NAMES = tuple(
    """
    ada adam agnes alba alma amos anna anton arlo astrid axel basil beata bela boris bruno carla carmen cecil clara
    conrad cora cyril dana daria david dora edgar edith elias ella elsa emil emma enzo erik esther eva ezra fanny
    felix fiona flora frank freya frida georg gerda gina greta gustav hanna hans harald heidi helga henry hilda hugo
    ida igor ilse ines inga irma ivan ivo jack jana jasper jens joan jonas judith julia karl kira klaus lara lars laura
    leah lena leo lewis lilly linus lotte louis lucas lydia mabel magda marco maria mark martha max mia mila milo mona
    nadia nina noah nora olga oliver oscar otto paula petra piet quinn rita robin rosa ruben ruth sara
    """.split()
)

# Every relation leads from a person to a person, so relations chain freely: "ada boss teacher" is the teacher of
# ada's boss.
RELATIONS = ("boss", "coach", "doctor", "friend", "guest", "lawyer", "mentor", "rival", "tailor", "teacher")

# Padding that gives an answer to a query the size of a real passage.
FILLER = tuple(
    """
    about after again all also always among and another are around as at away because before between both but by
    during each early even every few first for from had has have here his in into it its later long many more most
    much near never next not of often old on once one other out over own since so some still such than that the their
    then there these they this those through time to under until up was were when where which while who with year
    """.split()
)

# Words of the prompts and of the environment's own messages.
MESSAGE = ("questions", "copy", "lookup", "nothing", "found", "malformed", "write", "name", "relation", "or", "answered")

PUNCTUATION = (".", ";", ":", ",", "?", "|")
