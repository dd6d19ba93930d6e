"""The vocabulary. One word is one token, so lengths in words are lengths in tokens."""

from __future__ import annotations

# Given names: the entities of the knowledge bases. As many, that 32 questions of 4 hops share nobody.
NAMES = tuple(
    """
    abel ada adam agnes albert alice alma amelie amos andre anna anton arlo aron arthur astor astrid
    axel basil beata bella bernd bianca bodo boris bruno carl carla cecil celia claire clara conrad cora
    cyril daisy dana daniel daphne david delia denis diana dirk dora doris edgar edith edna elias ella
    ellen elmar emil emma enzo erik ernst esther eugen eva evan ezra fabian fanny felix fiona flora
    frank fred freya fritz georg gerda gero gina gisela grace greta gustav hagen hanna hans harald
    hector heidi helen henry hilda holger hugo ida igor ilse imre ines irene isaac ivan ivo jack jakob
    jana janet jasper jens joan jonas josef judith jules kai karl kaspar katja kira klaus konrad kurt
    lara laura leah lena leo leon lewis liam lina linus lisa lois lorenz lotte luca luise luna lydia
    mara marco maria max mia milo mona nadia nina noah nora olga oscar otto paula petra quinn rita rosa
    ruben ruth sara simon
    """.split()
)

# Every relation leads from a person to a person, so relations chain freely: "ada boss teacher" is the teacher
# of ada's boss.
RELATIONS = ("boss", "coach", "doctor", "friend", "guest", "lawyer", "mentor", "rival", "tailor", "teacher")

# What questions are numbered with.
NUMBERS = tuple(str(number) for number in range(1, 100))

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
    """
    answer questions order a name copy lookup found nothing malformed write relation answered hint you turn
    turns left
    """.split()
)

PUNCTUATION = (".", ";", ":", ",", "?", "|")
