"""The vocabulary. One word is one token, so lengths in words are lengths in tokens."""

from __future__ import annotations

# Given names: the entities of the knowledge bases. Eighty, so that 16 questions of 4 hops share nobody.
NAMES = tuple(
    """
    ada adam agnes alma amos anna arlo astrid basil beata boris bruno carla cecil clara cora cyril dana
    david dora edgar elias ella emil emma enzo esther eva ezra felix fiona flora frank freya georg gina
    greta gustav hanna hugo ida igor ines ivan jack jana jasper joan judith karl kira lara leah leo lewis
    linus lotte lydia marco maria max mia milo mona nadia nina noah nora olga oscar otto paula petra quinn
    rita rosa ruben ruth sara simon
    """.split()
)

# Every relation leads from a person to a person, so relations chain freely: "ada boss teacher" is the teacher
# of ada's boss.
RELATIONS = ("boss", "coach", "doctor", "friend", "guest", "lawyer", "mentor", "rival", "tailor", "teacher")

# Padding that gives an answer to a query the size of a real passage.
FILLER = tuple(
    """
    about after again all also always among and another are around as at away because before between
    both but by during each early even every few first for from had has have here his in into it its
    later long many more most much near never next not of often old on once one other out over own since
    so some still such than that the their then there these they this those through time to under until
    up was were when where which while who with year or
    """.split()
)

# Words of the prompts and of the environments' own messages that are not among the above.
MESSAGE = tuple(
    "answer questions order a name copy lookup found nothing malformed write relation answered".split()
)

PUNCTUATION = (".", ";", ":", ",", "?", "|")
