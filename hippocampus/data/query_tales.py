"""Short tales with a name, a place and a thing to be filled in, and the words to do so."""

from __future__ import annotations

NAMES = ("Ada", "Ben", "Clara", "Dan", "Elsa", "Finn", "Greta", "Hugo", "Ida", "Jonas", "Karin",
         "Leo", "Mara", "Nils", "Olga", "Paul", "Rosa", "Sam", "Tilda", "Vera")
PLACES = ("the harbour", "the old mill", "the station", "the garden", "the market",
          "the lighthouse", "the library", "the bridge", "the forest", "the school")
THINGS = ("lamp", "key", "boat", "coat", "drum", "kite", "clock", "cup", "rope", "stone", "bell",
          "book", "ladder", "basket", "mirror", "wheel")

TALES = (
    "{name} found a {thing} near {place}. It was wet and cold and did not belong to anyone. All "
    "the way home nobody asked about it. In the evening it stood by the fire and dried. In the "
    "morning it was gone.",
    "Every Sunday {name} walked to {place}. There was a bench, and on the bench there was always "
    "an old man. They never spoke. One Sunday the bench was empty but for a {thing}. There was a "
    "note beside it with a single word.",
    "The wind came up at noon. It took the hats first, and then the washing. At {place} it took "
    "a {thing} out of the hands of {name}. People laughed and ran after it. Nobody ever saw it "
    "come down.",
    "{name} had promised to bring the {thing} before dark. But the road to {place} was under "
    "water. So there was nothing to do but to wait on the hill. The stars came out one after the "
    "other. Down in the village a window was still bright.",
    "Nobody at {place} could repair the {thing}. {name} looked at it for a long time and said "
    "nothing. Then there was a small click. Everybody held their breath. It had only been upside "
    "down.",
    "The snow had covered {place} in a single night. {name} opened the door and could not see the "
    "fence. Somewhere below the white there was a {thing}. The dog began to dig at once. Soon "
    "there were only two ears and a tail.",
    "There was a letter for {name}, without a sender. It said to come to {place} at nine and to "
    "bring a {thing}. At nine the moon was behind a cloud. Steps came closer on the gravel. Then "
    "someone began to sing a birthday song.",
    "{name} was afraid of the cellar. The {thing} was in the cellar, on the highest shelf. There "
    "were eleven steps, and the seventh one creaked. A mouse sat on the last one and looked up. "
    "It was plainly more afraid.",
    "At {place} they told a story about a {thing} that could speak. {name} did not believe a word "
    "of it. But when the others had left there was a small voice. It asked what time it was. It "
    "had missed its train.",
    "The bus to {place} was late again. {name} counted the clouds and came to forty. A stranger "
    "sat down with a {thing} on his knees. He asked whether one could eat clouds. They agreed "
    "that the small ones might be sweet.",
    "When the music stopped {name} was the last one standing. The prize was a {thing}, tied with "
    "a ribbon. It was too big for the bicycle. So the whole band helped to carry it to {place}. "
    "They played all the way.",
    "The map showed a path behind {place}, but there was only grass. {name} knelt down and felt "
    "for stones. The first one was loose, and under it lay a {thing}. It was still warm. Somebody "
    "had been here a moment ago.")
