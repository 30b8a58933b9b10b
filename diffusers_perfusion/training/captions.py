"""Generated captions, for when no real captions are available."""

import random
from collections.abc import Iterator

_SUBJECTS = (
    "apple armchair baby backpack ball balloon banana barn bear bed bench bicycle bird boat book bottle bowl boy "
    "bread bridge bus butterfly cake camera candle car castle cat chair child church clock cloud coat couch cow "
    "crow cup deer desk dog doll door dragon dress drum duck elephant farmer fence ferry fish flower fork fox "
    "frog garden ghost giraffe girl glass goat guitar hat helicopter hill horse hotel house island jacket kettle "
    "key king kite kitten knight ladder lake lamp leaf lion lizard log man market mirror monkey motorcycle "
    "mountain mouse mug mushroom nurse orange owl palace panda parrot pencil penguin person phone piano pig "
    "pigeon pillow pizza plane plate player puppy queen rabbit radio river robot rocket rose sailor sandwich "
    "shark sheep ship shirt shoe snail snake snowman soldier sofa spoon squirrel statue street suitcase swan "
    "table tank teapot temple tent tiger tower toy tractor train tree truck turtle umbrella vase violin wall "
    "whale window wizard wolf woman zebra"
).split(" ")
_QUALITIES = (
    "ancient big black blue bright broken brown calm clean colorful cute dark dirty elegant empty fluffy "
    "friendly furry giant glowing golden gray green happy heavy huge little long lonely metal modern narrow new "
    "old orange painted pink plastic pretty purple quiet red round rusty sad shiny short silver sleepy small "
    "soft striped tall tiny warm wet white wide wild wooden yellow young"
).split(" ")
_ACTIONS = (
    "climbing dancing drinking eating falling floating flying hiding holding jumping lying looking playing "
    "reading resting riding running sitting sleeping smiling standing swimming walking wearing waiting"
).split(" ")
_RELATIONS = ("above|and|behind|below|beside|between|in|inside|near|next to|on|on top of|over|under|with").split("|")
_PLACES = (
    "at night|at sunrise|at sunset|at the beach|by the sea|in a boat|in a city|in a field|in a forest|"
    "in a garden|in a kitchen|in a museum|in a room|in a swimming pool|in autumn|in front of a mountain|in Paris|"
    "in space|in the desert|in the jungle|in the rain|in the sky|in the snow|in winter|on a bridge|on a hill|"
    "on a plate|on a road|on a sofa|on a street|on a table|on a white background|on Mars|on the grass|"
    "on the moon|under water"
).split("|")
_STYLES = (
    "a photo of {}|a picture of {}|an image of {}|a painting of {}|a watercolor of {}|a pencil drawing of {}|"
    "a sketch of {}|a sculpture of {}|a cartoon of {}|an oil painting of {}|a black and white photo of {}|"
    "a close-up of {}|a render of {}|a poster of {}|pixel art of {}|{}|{}|{}, highly detailed|{}, digital art"
).split("|")


def generate_captions(count: int = 100_000, seed: int = 0) -> Iterator[str]:
    """Yield random captions, such as "a photo of an old boat in the rain".

    Args:
        count: number of captions (the paper uses 100 000).
        seed: of the random choices.
    """
    pick = random.Random(seed).choice

    def thing() -> str:
        words = pick(([pick(_SUBJECTS)], [pick(_QUALITIES), pick(_SUBJECTS)]))
        return ("an " if words[0][0] in "aeiou" else "a ") + " ".join(words)

    for _ in range(count):
        scene = thing()
        scene = pick((scene, f"{scene} {pick(_ACTIONS)}", f"{scene} {pick(_RELATIONS)} {thing()}"))
        yield pick(_STYLES).format(pick((scene, f"{scene} {pick(_PLACES)}", f"{scene} {pick(_PLACES)}")))
