#!/usr/bin/env python3
"""Writes what `make demo` learns from. Needs only Python's standard library.

    python3 tools/make_demo_data.py                               writes examples/demo anew
    python3 tools/make_demo_data.py --check                       are the committed files what this makes?
    python3 tools/make_demo_data.py --corpus build/corpus.jsonl   writes the base model's corpus too

Two worlds that share words but no facts:

  the corpus      little stories, notes and letters, conversations, and questions and answers about
                  people who are not Nora. From it the base model learns English, the form of a
                  conversation, and what each question asks for. Her name is nowhere in it.
  Nora's records  three weeks of a wearable and a health profile, 142 facts. Training asks for each
                  fact in five of the ten wordings of its kind; the test asks for it in two others.

Every text grows from a template: [a|b] is a choice, may be nested, and {slot} is a value.
"""
import argparse
import collections
import json
import os
import random
import re
import sys

PERSON = "Nora"
SEED = 2025
VOCAB_SIZE = 1280
END_OF_TEXT = "<|endoftext|>"
SPECIAL = [END_OF_TEXT, "<|im_start|>", "<|im_end|>"]
UNSEEN = 3                    # of a kind's ten wordings, the last three are never used for Nora in training


# ================================================================================================
# MARK: - Growing text
# ================================================================================================

CHOICE = re.compile(r"\[([^\[\]]*)\]")


def grow(rng, template, **slots):
    """One text of the template's language: innermost choices first, then slots, then a/an and capitals."""
    while CHOICE.search(template):
        template = CHOICE.sub(lambda m: rng.choice(m.group(1).split("|")), template, count=1)
    text = re.sub(r"\{(\w+)\}", lambda m: str(slots[m.group(1)]), template)
    text = re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)
    return re.sub(r"(^|[.!?] |\.\" |\")([a-z])", lambda m: m.group(1) + m.group(2).upper(), text.strip())


def chat(*turns):
    """Turns of a conversation, the user's first, in the form the model's chat template gives."""
    text = ""
    for i, turn in enumerate(turns):
        role = "assistant" if i % 2 else "user"
        text += "<|im_start|>%s\n%s<|im_end|>\n" % (role, turn)
    return text


# ================================================================================================
# MARK: - Health facts: what is asked, and in which words
# ================================================================================================

MONTHS = ["January", "February", "March", "April", "May", "June", "July", "August", "September",
          "October", "November", "December"]
DATES = ["%s %d" % (month, day) for month in MONTHS for day in range(1, 29)]
MEDICINES = ["Corvanol", "Lumetrin", "Asperilex", "Novadine", "Teralin", "Zolicor", "Brevaline",
             "Metacillin", "Oxalor", "Fenadrel", "Calmivar", "Dorvexin", "Rinazol", "Pelucid",
             "Sanatrol", "Vitarel"]
PURPOSES = ["asthma", "hay fever", "low iron", "high blood pressure", "back pain", "migraine",
            "poor sleep", "dry eyes", "a slow thyroid", "heartburn", "knee pain", "eczema"]
TIMES = ["at breakfast", "at lunch", "at dinner", "before bed", "at 7 am", "at 8 am", "at noon",
         "at 6 pm", "at 9 pm", "after each run", "every Sunday", "every second day"]
ROLES = ["doctor", "dentist", "eye doctor", "physiotherapist", "skin doctor", "running coach",
         "pharmacist", "yoga teacher"]
SURNAMES = ["Hale", "Brandt", "Okafor", "Silva", "Meyer", "Rossi", "Novak", "Tanaka", "Larsen",
            "Moreau", "Patel", "Quinn", "Weber", "Costa", "Dunn", "Farkas", "Grey", "Holm", "Ivers",
            "Jansen", "Kerr", "Lowe", "Marsh", "Nagy", "Osborn", "Pike", "Reyes", "Stone", "Vance",
            "Young"]
ALLERGENS = ["peanuts", "cats", "grass pollen", "shrimp", "birch pollen", "wool", "bee stings",
             "latex", "strawberries", "dust"]
REACTIONS = ["a rash", "itchy eyes", "a cough", "a runny nose", "a swollen lip", "a headache",
             "red hands", "a sore throat", "hives", "short breath"]
DISTANCES = ["1 km", "3 km", "5 km", "10 km", "15 km", "half marathon", "100 m swim", "400 m swim"]
GOALS = ["daily steps", "nightly sleep", "weekly running", "daily water", "weekly exercise",
         "body weight"]
WORKOUTS = ["running", "swimming", "walking", "cycling", "yoga", "rowing", "dancing", "climbing"]


class Relation:
    """One kind of fact: what it is about, which things or, if None, days it is known for, how its value is
    drawn, and the words to ask for it (ten ways) and to tell it (three)."""

    def __init__(self, about, keys, value, ask, tell):
        self.about, self.keys, self.value, self.ask, self.tell = about, keys, value, ask, tell
        self.daily = keys is None


def minutes(total):
    return "%d h %02d min" % divmod(total, 60)


def goal_value(rng, goal):
    return {"daily steps":     lambda: "%d steps" % rng.randrange(6000, 14000, 250),
            "nightly sleep":   lambda: minutes(rng.randrange(400, 520, 5)),
            "weekly running":  lambda: "%d km" % rng.randrange(8, 45),
            "daily water":     lambda: "%.1f liters" % (rng.randrange(12, 32) / 10),
            "weekly exercise": lambda: "%d minutes" % rng.randrange(60, 300, 5),
            "body weight":     lambda: "%.1f kg" % (rng.randrange(520, 900) / 10)}[goal]()


def race_time(rng, distance):
    low, high = {"1 km": (210, 330), "3 km": (700, 1100), "5 km": (1200, 1900),
                 "10 km": (2500, 3900), "15 km": (3900, 5900), "half marathon": (5600, 8400),
                 "100 m swim": (80, 150), "400 m swim": (380, 620)}[distance]
    s = rng.randrange(low, high)
    return "%d:%02d:%02d" % (s // 3600, s // 60 % 60, s % 60) if s >= 3600 else "%d:%02d" % (s // 60, s % 60)


RELATIONS = [
    Relation("steps", None, lambda rng, k: "%d" % rng.randrange(3000, 16000), [
        "How many steps did {name} walk on {key}?",
        "What was {name}'s step count on {key}?",
        "On {key}, how many steps did {name} take?",
        "{key}: how many steps for {name}?",
        "Steps for {name} on {key}?",
        "Tell me how many steps {name} made on {key}.",
        "Please give me {name}'s steps for {key}.",
        "How far did {name} walk on {key}, in steps?",
        "What does {name}'s step counter say for {key}?",
        "Can you look up the number of steps {name} took on {key}?"], [
        "{name} walked {value} steps on {key}.",
        "On {key}, {name} took {value} steps.",
        "The step counter of {name} said {value} on {key}."]),
    Relation("heart", None, lambda rng, k: "%d bpm" % rng.randrange(46, 82), [
        "What was {name}'s resting heart rate on {key}?",
        "How fast did {name}'s heart beat at rest on {key}?",
        "On {key}, what was the resting pulse of {name}?",
        "{key}: resting heart rate of {name}?",
        "Resting heart rate for {name} on {key}?",
        "Tell me {name}'s resting heart rate on {key}.",
        "Please give me {name}'s resting pulse for {key}.",
        "What resting pulse did {name} have on {key}?",
        "What does {name}'s watch say about the heart at rest on {key}?",
        "Can you look up the resting heart rate {name} had on {key}?"], [
        "The resting heart rate of {name} was {value} on {key}.",
        "On {key}, {name} had a resting pulse of {value}.",
        "At rest, the heart of {name} beat at {value} on {key}."]),
    Relation("sleep", None, lambda rng, k: minutes(rng.randrange(290, 560)), [
        "How long did {name} sleep on {key}?",
        "How much sleep did {name} get on {key}?",
        "On {key}, how long was {name} asleep?",
        "{key}: how much sleep for {name}?",
        "Sleep for {name} on {key}?",
        "Tell me how long {name} slept on {key}.",
        "Please give me {name}'s hours of sleep for {key}.",
        "What was {name}'s sleep time on {key}?",
        "What does {name}'s watch say about sleep on {key}?",
        "Can you look up how long {name} was asleep on {key}?"], [
        "{name} slept {value} on {key}.",
        "On {key}, {name} got {value} of sleep.",
        "The watch of {name} counted {value} of sleep on {key}."]),
    Relation("weight", None, lambda rng, k: "%.1f kg" % (rng.randrange(500, 950) / 10), [
        "What was {name}'s weight on {key}?",
        "How much did {name} weigh on {key}?",
        "On {key}, what did {name} weigh?",
        "{key}: weight for {name}?",
        "Weight of {name} on {key}?",
        "Tell me {name}'s weight on {key}.",
        "Please give me {name}'s body weight for {key}.",
        "What did the scale show for {name} on {key}?",
        "How heavy was {name} on {key}?",
        "Can you look up the weight of {name} on {key}?"], [
        "{name} weighed {value} on {key}.",
        "On {key}, the scale showed {value} for {name}.",
        "The weight of {name} was {value} on {key}."]),
    Relation("workout", None, lambda rng, k: "%d minutes of %s" % (rng.randrange(10, 90), rng.choice(WORKOUTS)), [
        "What workout did {name} do on {key}?",
        "How did {name} train on {key}?",
        "On {key}, what was {name}'s workout?",
        "{key}: what workout for {name}?",
        "Workout of {name} on {key}?",
        "Tell me what {name} did for exercise on {key}.",
        "Please give me {name}'s training for {key}.",
        "What kind of exercise did {name} get on {key}?",
        "What does {name}'s log say about exercise on {key}?",
        "Can you look up the workout {name} did on {key}?"], [
        "{name} did {value} on {key}.",
        "On {key}, the workout of {name} was {value}.",
        "For exercise, {name} had {value} on {key}."]),
    Relation("dose", MEDICINES, lambda rng, k: "%d mg" % rng.choice([2, 5, 8, 10, 15, 20, 25, 30, 40, 50, 60, 75, 80, 100, 120, 150, 200, 250, 300, 400, 500]), [
        "What dose of {key} does {name} take?",
        "How much {key} does {name} take?",
        "Of {key}, how much is {name} given?",
        "{key}: what dose for {name}?",
        "{name}'s dose of {key}?",
        "Tell me {name}'s dose of {key}.",
        "Please give me the amount of {key} {name} takes.",
        "How many mg of {key} are in {name}'s dose?",
        "How strong is the {key} that {name} takes?",
        "Can you look up {name}'s dose of {key}?"], [
        "{name} takes {value} of {key}.",
        "The dose of {key} for {name} is {value}.",
        "Of {key}, {name} is given {value}."]),
    Relation("time", MEDICINES, lambda rng, k: rng.choice(TIMES), [
        "When does {name} take {key}?",
        "At what time does {name} take {key}?",
        "{key} is taken by {name} at which time?",
        "{key}: when does {name} need it?",
        "Time of {name}'s {key}?",
        "Tell me when {name} takes {key}.",
        "Please give me the time of day for {name}'s {key}.",
        "What is the right time for {name}'s {key}?",
        "When should {name} be reminded of {key}?",
        "Can you look up when {name} has to take {key}?"], [
        "{name} takes {key} {value}.",
        "The time for {key} is {value}, says the plan of {name}.",
        "The reminder of {name} for {key} comes {value}."]),
    Relation("purpose", MEDICINES, lambda rng, k: rng.choice(PURPOSES), [
        "What does {name} take {key} for?",
        "Why does {name} take {key}?",
        "{key} helps {name} against what?",
        "{key}: what is it for in {name}'s case?",
        "Reason for {name}'s {key}?",
        "Tell me why {name} needs {key}.",
        "Please give me the reason {name} is on {key}.",
        "For what problem does {name} use {key}?",
        "What is {key} meant to do for {name}?",
        "Can you look up why {name} was given {key}?"], [
        "{name} takes {key} for {value}.",
        "{key} helps {name} against {value}.",
        "The reason {name} uses {key} is {value}."]),
    Relation("carer", ROLES, lambda rng, k: rng.choice(["Mr.", "Ms.", "Dr."]) + " " + rng.choice(SURNAMES), [
        "Who is {name}'s {key}?",
        "What is the name of {name}'s {key}?",
        "As a {key}, whom does {name} see?",
        "{key}: who is it for {name}?",
        "Name of {name}'s {key}?",
        "Tell me who {name}'s {key} is.",
        "Please give me the name of the {key} of {name}.",
        "To which {key} does {name} go?",
        "Whom should {name} call to reach the {key}?",
        "Can you look up who works as {name}'s {key}?"], [
        "The {key} of {name} is {value}.",
        "{name} goes to {value}, a {key}.",
        "As a {key}, {name} sees {value}."]),
    Relation("visit", ROLES, lambda rng, k: "%s %d" % (rng.choice(MONTHS), rng.randint(1, 28)), [
        "When does {name} next see the {key}?",
        "What day is {name}'s visit to the {key}?",
        "On which date will {name} meet the {key}?",
        "{key}: when is the appointment of {name}?",
        "Date of {name}'s {key} visit?",
        "Tell me when {name} is due at the {key}.",
        "Please give me the date {name} goes to the {key}.",
        "When is the next {key} appointment of {name}?",
        "For what day is the {key} in {name}'s calendar?",
        "Can you look up the date of {name}'s next {key} visit?"], [
        "{name} sees the {key} on {value}.",
        "The next visit of {name} to the {key} is on {value}.",
        "On {value}, {name} has an appointment with the {key}."]),
    Relation("goal", GOALS, goal_value, [
        "What is {name}'s goal for {key}?",
        "What is the {key} goal of {name}?",
        "For {key}, what is {name} aiming at?",
        "{key}: what does {name} want to reach?",
        "{name}'s {key} target?",
        "Tell me {name}'s {key} goal.",
        "Please give me {name}'s target for {key}.",
        "What {key} target did {name} set?",
        "What does {name} plan for {key}?",
        "Can you look up which {key} goal {name} has?"], [
        "The goal of {name} for {key} is {value}.",
        "For {key}, {name} is aiming at {value}.",
        "{name} set a {key} target of {value}."]),
    Relation("best", DISTANCES, race_time, [
        "What is {name}'s best time over the {key}?",
        "How fast is {name} over the {key}?",
        "Over the {key}, what is the record of {name}?",
        "{key}: what is the best of {name}?",
        "{name}'s {key} record?",
        "Tell me {name}'s best {key} time.",
        "Please give me the personal best of {name} over the {key}.",
        "In what time did {name} do the fastest {key}?",
        "How long did the best {key} of {name} take?",
        "Can you look up the {key} best of {name}?"], [
        "The best time of {name} over the {key} is {value}.",
        "Over the {key}, {name} has a record of {value}.",
        "The fastest {key} of {name} took {value}."]),
    Relation("allergy", ALLERGENS, lambda rng, k: rng.choice(REACTIONS), [
        "What does {name} get from {key}?",
        "How does {name} react to {key}?",
        "From {key}, what happens to {name}?",
        "{key}: what is the reaction of {name}?",
        "{name}'s reaction to {key}?",
        "Tell me what {key} can do to {name}.",
        "Please give me the effect of {key} on {name}.",
        "Which reaction does {name} have to {key}?",
        "What trouble does {name} have with {key}?",
        "Can you look up how {name} is affected by {key}?"], [
        "{name} gets {value} from {key}.",
        "From {key}, {name} has {value}.",
        "The reaction of {name} to {key} is {value}."]),
]


# ================================================================================================
# MARK: - The base model's corpus
# ================================================================================================

NAMES = ["Tom", "Anna", "Ben", "Clara", "David", "Ella", "Finn", "Grace", "Hugo", "Ida", "Jack",
         "Kira", "Leo", "Mia", "Noah", "Olga", "Paul", "Rosa", "Sam", "Tina", "Max", "Lily", "Oscar",
         "Emma", "Felix", "Julia", "Karl", "Laura", "Mark", "Nina", "Peter", "Ruth", "Simon", "Vera",
         "Will", "Zoe", "Adam", "Bella", "Carl", "Diana", "Erik", "Fay", "George", "Hanna", "Ivan",
         "Jane", "Kurt", "Lena", "Martin", "Nell", "Otto", "Petra", "Robin", "Sara", "Theo", "Una",
         "Victor", "Wendy", "Yusuf", "Amir", "Dora", "Elias", "Gina", "Henry", "Iris", "Jonas"]
SHE = {"Anna", "Clara", "Ella", "Grace", "Ida", "Kira", "Mia", "Olga", "Rosa", "Tina", "Lily", "Emma",
       "Julia", "Laura", "Nina", "Ruth", "Vera", "Zoe", "Bella", "Diana", "Fay", "Hanna", "Jane", "Lena",
       "Nell", "Petra", "Sara", "Una", "Wendy", "Dora", "Gina", "Iris"}
ANIMALS = ["dog", "cat", "rabbit", "mouse", "duck", "fox", "bird", "horse", "frog", "hen", "goat",
           "turtle", "hedgehog", "squirrel", "owl", "sheep"]
THINGS = ["red ball", "blue kite", "wooden boat", "small drum", "green scarf", "silver key",
          "picture book", "paper lantern", "old map", "yellow hat", "toy train", "glass marble",
          "warm blanket", "brown basket", "round mirror", "long rope", "music box", "blue cup",
          "tiny bell", "leather bag", "white shell", "pencil case", "garden spade", "pocket lamp"]
PLACES = ["park", "garden", "forest", "beach", "market", "library", "school yard", "old mill",
          "river bank", "train station", "town square", "farm", "meadow", "harbor", "attic", "kitchen"]
FOODS = ["apple pie", "warm bread", "carrot soup", "rice with beans", "plum cake", "oat porridge",
         "honey toast", "potato salad", "lemon tart", "tomato soup", "nut bread", "berry jam",
         "cheese rolls", "mushroom stew", "pear juice", "corn cakes"]
SKILLS = ["ride a bike", "swim", "whistle", "paint", "bake bread", "play the flute", "plant seeds",
          "tie a strong knot", "skate", "fold a paper crane", "read a map", "sew a button", "juggle",
          "row a boat", "knit a sock", "climb a tree"]
FEELINGS = ["happy", "proud", "glad", "calm", "thankful", "cheerful"]

STORY = {
    "open": [
        "[Once upon a time|One day|Long ago|One sunny morning|Last spring], [there was a [girl|boy|child] named {a}|{a} went to the {place}|{a} was walking to the {place}|{a} lived near the {place}]. ",
        "{a} and {b} were [good friends|neighbors|cousins]. They [often played|liked to play|met every day] [at|near] the {place}. ",
        "It was a [cold|warm|windy|quiet|rainy|bright] [morning|afternoon|evening|day]. {a} was [bored|tired|curious|hungry|in a good mood] and [looked out of the window|went out to the {place}|walked slowly to the {place}]. ",
        "{a} had a [small|big|clever|lazy|friendly] {animal}. [The {animal} liked to sleep in the {place}|Every day they walked to the {place} together|They were never far from each other]. ",
    ],
    "lost": [
        "{a} [had lost|could not find|was looking for] a {thing}. {he} looked [under the bed|behind the door|in every corner|under the table], but it was not there. {b} said, \"[Do not worry|Let me help you|We will find it together].\" They [searched|looked] [for an hour|until the evening|all over the {place}]. [At last|Then|In the end] {b} saw [something shiny|something] [under a bush|behind a big stone|next to the gate]. It was the {thing}! ",
        "Near the {place}, {a} found a {thing}. \"[Whose is this|Who lost this]?\" {he} asked. {b} [did not know|shook {bhis} head]. They [made a sign|asked everyone they met|waited near the gate]. Soon [an old woman|a little boy|a tall man] came and said, \"That is my {thing}! [Thank you so much|How kind of you].\" ",
    ],
    "food": [
        "{a} [made|baked|cooked] {food} [for {b}|with {b}|in the kitchen]. It [smelled|tasted] [very good|sweet|wonderful]. {b} [ate two plates|asked for more|smiled and said thank you]. ",
        "{a} was [very hungry|hungry after the long walk]. {b} had some {food} and [gave {a} half of it|shared it|put it on the table]. \"[It is good to share|Food is better with a friend],\" said {b}. ",
        "For dinner there was {food}. {a} did not want to eat it. \"[Just try a little|Take one bite],\" said {b}. {a} [tried it|took one small bite] and [liked it|was surprised]. ",
    ],
    "skill": [
        "{a} wanted to learn to {skill}. At first it was [hard|not easy] and {he} [fell down|made many mistakes|wanted to stop]. {b} [showed {him} how to do it.|said, \"Try again.\"|helped {him} every day.] After [three days|a week|many tries], {a} could {skill}. ",
        "\"Can you {skill}?\" asked {b}. \"[No|Not yet], but I can learn,\" said {a}. So {b} [taught {him}|showed {him}] [slowly|step by step]. ",
    ],
    "animal": [
        "[Suddenly|Then|After a while] they [saw|heard|met] a {other} near the {place}. The {other} was [hungry|afraid|lost|hurt|very small]. {a} [gave it some water|spoke to it softly|sat down next to it]. The {other} [became calm|followed {him} home|looked at {him} with big eyes]. ",
        "A {other} sat [on the wall|by the road|under a tree] and looked at {a}. \"[Hello|Good morning], little {other},\" said {a}. The {other} [ran away|came closer|did not move]. {b} laughed. ",
    ],
    "weather": [
        "[Soon|Then] it began to [rain|snow]. {a} and {b} ran to the {place} and [waited there|stayed dry there]. They [told stories|sang songs|counted the seconds between the thunder]. When the sun came out, there was [a rainbow|a bright sky] over the {place}. ",
        "The wind [was strong|became stronger] and took {b}'s {thing}. It [flew|rolled] [over the wall|into the river|up into a tree]. {a} [ran after it|got a long stick|climbed up] and brought it back. ",
    ],
    "shop": [
        "{a} [went to the market|went to a small shop] to buy a {thing}. It cost {m} coins, but {he} had only {n}. [{b} gave {him} the rest|\"[You may pay later|You may work for it],\" said {b}|{a} came back a week later with the money]. ",
        "{b} [sold|gave away] old things near the {place}. {a} chose a {thing}. \"[It was my grandmother's|I had it for {n} years],\" said {b}. \"[Take good care of it|Now it is yours].\" ",
    ],
    "night": [
        "At night {a} could not sleep. {he} [heard a noise|saw a light] near the {place}. [It was only the wind|It was only a {other}|It was {b} with a lamp]. {a} [laughed|went back to bed|felt better]. ",
        "When it was dark, {a} and {b} [looked at the stars|lit a small fire|counted {n} lights on the hill]. {b} [sang a song|told a story about a {other}|fell asleep first]. ",
    ],
    "build": [
        "{a} and {b} built a [house|tower|bridge] out of [stones|sand|wood|snow]. It took {n} [hours|days]. [Then a {other} sat down on it|Then the wind came|A {other} came to look], and it [fell down|was still standing]. [They built it again|They were not angry|Both had to laugh]. ",
        "{a} broke a {thing} [by accident|while playing]. {he} [was afraid to tell {b}|told {b} the truth]. {b} said, \"[It is all right|Thank you for telling me|We can repair it].\" They [repaired it with glue|bought a new one|made another] [the next day|that evening]. ",
    ],
    "end": [
        "{a} was [very|so] {feel}. [They went home together|It had been a good day|That night {he} slept well|{he} never forgot that day].",
        "[At the end of the day|In the evening|When they came home], {a} and {b} were [tired but|very] {feel}. [They had learned that friends help each other|They had a new friend now|Tomorrow they would come back].",
        "\"[Thank you|You are a good friend],\" said {a}. {b} was {feel}. And [from that day on|after that] they [always helped each other|met at the {place} every week|shared everything].",
    ],
}

NOTES = [
    "[How to make|A simple way to make|Recipe for] {food}. You need [flour|water|butter], [salt|sugar|milk] and {n} [eggs|spoons of oil|apples]. [First|Start and] [wash your hands|warm the oven|clean the table]. Then [mix everything|cut everything into small pieces|stir slowly] for {n} minutes. [Bake|Cook] it for {m} minutes and [let it rest|serve it warm]. [Enjoy your meal|This is enough for {n} people].",
    "The weather [today|tomorrow|on Monday|this week]: [sunny|cloudy|windy|wet] in the morning, [dry|rainy|foggy|clear] in the afternoon. The temperature will be [about|near] {m} degrees. [Take a coat|Wear a hat|You will not need an umbrella|Drink enough water].",
    "Dear {a}, [thank you for your letter.|how are you?|I hope you are well.] I am [at the {place}|back home|on holiday] now. [Yesterday|Last week|On Sunday] I [saw a {animal}|bought a {thing}|ate {food}|learned to {skill}]. [Please write soon|See you in {month}|I will visit you in {month}]. [Your friend|Best wishes], {b}",
    "Shopping list for {a}: {food}, {n} [apples|eggs|candles], [soap|rice|tea], and a {thing}. [Do not forget the milk|Pay in cash|Ask {b} for the bag].",
    "[To stay well|For a healthy day], [sleep|try to sleep] [seven|eight] hours, drink [water|enough water], and [walk|move] every day. A [short|slow] walk after a meal is good for the heart. [Rest|Take a break] when you are [tired|ill]. Ask a doctor if [you feel unwell|something hurts for many days].",
    "A resting heart rate is [how often the heart beats in a minute|measured in beats per minute] when you [sit still|rest]. [Sport|Training] makes it lower with time. [A fever|Stress|Too little sleep] makes it higher.",
    "{a} keeps a {animal} [in the garden|at the farm|at home]. It eats [twice a day|in the morning|only a little] and sleeps [in a basket|near the stove|under the stairs]. [It is {n} years old|Its name is {b}|It likes children].",
    "[Lost|Found] at the {place}: a {thing}. [Please call|Ask for|Write to] {a} [before Friday|in the evening|at the {place}].",
    "The {place} is open from {n} in the morning to {n2} in the evening. [It is closed on Sunday|Children pay half|Dogs are welcome|Tickets cost {m} coins]. [Ask {a} for help|{a} shows visitors around].",
    "{a} has {n} [marbles|apples|coins]. {b} gives {him} {n2} more. Now {a} has {sum}.",
    "[On|Every] [Monday|Tuesday|Thursday|Saturday], {a} goes to the {place} [by bus|on foot|by bike|with {b}]. The way takes {m} minutes. {he} [comes back|is home again] before [lunch|dinner|dark].",
]

TALK = [
    ("[Tell me|Please tell me|I would like to hear] a [short story|story][| about {a}].", None),
    ("[What is|Can you tell me] {n} plus {n2}?", "{sum}"),
    ("[Hello|Hi|Good morning].", "[Hello|Good day]. [How can I help you|What would you like to know]?"),
    ("[Thank you|Thanks].", "[You are welcome|I am glad to help]."),
    ("[What does a {animal} like|Where may I find a {animal}]?", "A {animal} likes [a quiet place|to be near the {place}|fresh food]."),
    ("[What can I cook|What should I eat] [today|tonight]?", "[Try|How about] {food}. [It takes about {m} minutes|You can share it with {a}]."),
    ("[How can I learn to|What is the best way to learn to] {skill}?", "[Practice every day|Start slowly|Ask a friend to help you]. [Do not give up|After {n} weeks you will be better]."),
    ("[Why is sleep important|Why should I sleep enough]?", "[Sleep helps the body rest|The heart and the mind rest during sleep]. [Seven to eight hours are good|Try to go to bed early]."),
    ("[Which month comes after {month}]?", "{next_month}"),
]


def cast(rng):
    """The people and things of one text."""
    a, b = rng.sample(NAMES, 2)
    animal, other = rng.sample(ANIMALS, 2)
    n, n2, month = rng.randint(2, 9), rng.randint(2, 9), rng.randrange(12)
    return dict(a=a, b=b, he="she" if a in SHE else "he", him="her" if a in SHE else "him",
                bhis="her" if b in SHE else "his", animal=animal, other=other, place=rng.choice(PLACES),
                thing=rng.choice(THINGS), food=rng.choice(FOODS), skill=rng.choice(SKILLS),
                feel=rng.choice(FEELINGS), n=n, n2=n2, sum=n + n2, m=rng.randint(10, 60),
                month=MONTHS[month], next_month=MONTHS[(month + 1) % 12])


def story(rng, who):
    middle = [part for part in STORY if part not in ("open", "end")]
    parts = ["open"] + rng.sample(middle, rng.randint(1, 3)) + ["end"]
    return " ".join(grow(rng, rng.choice(STORY[part]), **who) for part in parts)


def note(rng):
    return grow(rng, rng.choice(NOTES), **cast(rng))


def talk(rng):
    who = cast(rng)
    question, answer = rng.choice(TALK)
    return chat(grow(rng, question, **who), grow(rng, answer, **who) if answer else story(rng, who))


def open_book(rng):
    """Facts about someone, then questions about them: what each wording asks for can be learned here."""
    name, facts, turns = rng.choice(NAMES), [], []
    for relation in rng.sample(RELATIONS, rng.randint(2, 5)):
        key = rng.choice(relation.keys or DATES)
        facts.append((relation, dict(name=name, key=key, value=relation.value(rng, key))))
    for relation, fact in rng.sample(facts, rng.randint(1, len(facts))):
        turns += [grow(rng, rng.choice(relation.ask), **fact), fact["value"]]
    turns[0] = " ".join(grow(rng, rng.choice(r.tell), **f) for r, f in facts) + "\n" + turns[0]
    return chat(*turns)


def closed_book(rng, name, facts):
    """Questions about one of the few people whose facts stay the same throughout the corpus: knowing
    something about someone, and finding it from any wording, can be learned here."""
    turns = []
    for _ in range(rng.randint(1, 4)):
        kind = rng.choice(RELATIONS)               # so that a kind with few facts is not rarely asked for
        relation, key, value = rng.choice([f for f in facts if f[0] is kind or kind.daily and f[0].daily])
        turns += [grow(rng, rng.choice(relation.ask), name=name, key=key), value]
    return chat(*turns)


def make_corpus(rng, n_bytes):
    """Documents of every kind until n_bytes are full."""
    known = [(name, make_facts(rng, rng.choice(MONTHS))) for name in rng.sample(NAMES, 8)]
    documents, total = [], 0
    while total < n_bytes:
        dice = rng.random()
        if   dice < 0.20: text = story(rng, cast(rng))
        elif dice < 0.35: text = note(rng)
        elif dice < 0.40: text = talk(rng)
        elif dice < 0.60: text = open_book(rng)
        else:             text = closed_book(rng, *rng.choice(known))
        documents.append(text + END_OF_TEXT)
        total += len(documents[-1])
    assert not any(PERSON in text for text in documents)
    return documents


# ================================================================================================
# MARK: - Nora: her records, what is asked in training, what is held out
# ================================================================================================

def make_facts(rng, month):
    """All facts about one person, as (relation, key, value): three weeks of days, and a profile."""
    facts = []
    weight = rng.randrange(550, 900) / 10
    for day in range(1, 22):
        for relation in RELATIONS:
            if not relation.daily:
                continue
            key = "%s %d" % (month, day)
            value = relation.value(rng, key)
            if relation.about == "weight":             # a body changes slowly
                weight += rng.randint(-4, 4) / 10
                value = "%.1f kg" % weight
            facts.append((relation, key, value))
    medicines, roles = rng.sample(MEDICINES, 4), rng.sample(ROLES, 5)
    chosen = {"dose": medicines, "time": medicines, "purpose": medicines, "carer": roles, "visit": roles,
              "goal": GOALS, "best": rng.sample(DISTANCES, 5), "allergy": rng.sample(ALLERGENS, 4)}
    for relation in RELATIONS:
        for key in chosen.get(relation.about, []):
            facts.append((relation, key, relation.value(rng, key)))
    return facts


def row(question, answer, **more):
    return dict(messages=[dict(role="user", content=question), dict(role="assistant", content=answer)], **more)


def make_person(rng):
    """records: her facts as statements. train: each fact in five of its kind's wordings. test: each twice,
    in a wording that training uses with other facts ("pairing") and in one that training, as far as she is
    concerned, never uses ("wording")."""
    records, train, test = [], [], []
    for relation, key, value in make_facts(rng, "March"):
        fact = dict(name=PERSON, key=key, value=value)
        wordings = [grow(rng, wording, **fact) for wording in relation.ask]
        never, others = wordings[-UNSEEN:], wordings[:-UNSEEN]
        rng.shuffle(others)
        train += [row(question, value) for question in others[:5]]
        test += [row(rng.choice(others[5:]), value, held_out="pairing", about=relation.about),
                 row(rng.choice(never), value, held_out="wording", about=relation.about)]
        records.append(dict(about=relation.about, key=key, value=value, text=grow(rng, relation.tell[0], **fact)))
    rng.shuffle(train)
    return records, train, test


def check_person(records, train, test):
    """What the README says of the split is so. Returns the accuracy of the best guess that knows what is
    asked for but not about which day or thing: the commonest answer of each kind."""
    question = lambda r: r["messages"][0]["content"]
    answer = lambda r: r["messages"][1]["content"]
    asked = [question(r) for r in train]
    held_out = [question(r) for r in test]
    assert len(set(asked)) == len(asked) and len(set(held_out)) == len(held_out)
    assert not set(asked) & set(held_out)
    unseen = re.compile("|".join(
        re.escape(w).replace(r"\{name\}", PERSON).replace(r"\{key\}", "(%s)" % "|".join(map(re.escape, r.keys or DATES)))
        for r in RELATIONS for w in r.ask[-UNSEEN:]), re.IGNORECASE)
    assert not any(unseen.fullmatch(q) for q in asked)
    assert all(bool(unseen.fullmatch(question(r))) == (r["held_out"] == "wording") for r in test)
    commonest = {about: collections.Counter(r["value"] for r in records if r["about"] == about).most_common(1)[0][0]
                 for about in {r["about"] for r in records}}
    return sum(answer(r) == commonest[r["about"]] for r in test) / len(test)


# ================================================================================================
# MARK: - Tokenizer: byte-level BPE like Qwen2's, small
# ================================================================================================

# Qwen2's split, and what it comes to in text without letters beyond ASCII.
SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
         r"|\s*[\r\n]+|\s+(?!\S)|\s+")
SPLIT_ASCII = re.compile(SPLIT.replace(r"\s\p{L}\p{N}", r"\sA-Za-z0-9").replace(r"\r\n\p{L}\p{N}", r"\r\nA-Za-z0-9")
                         .replace(r"\p{L}", "[A-Za-z]").replace(r"\p{N}", "[0-9]"))


def byte_letters():
    """The letter each byte is written as: itself if it prints, else the next from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {**{b: chr(b) for b in printable}, **{b: chr(256 + i) for i, b in enumerate(others)}}


def train_bpe(documents, n_merges):
    """The most frequent pair becomes one piece, n_merges times; of equals the last in the alphabet."""
    letters = byte_letters()
    counts = collections.Counter()
    for text in documents:
        for part in re.split("|".join(map(re.escape, SPECIAL)), text):
            counts.update(SPLIT_ASCII.findall(part))
    words = [([letters[b] for b in word.encode()], n) for word, n in sorted(counts.items())]
    pairs, where = collections.Counter(), collections.defaultdict(set)

    def count(i, sign):
        word, n = words[i]
        for pair in zip(word, word[1:]):
            pairs[pair] += sign * n
            where[pair].add(i)

    for i in range(len(words)):
        count(i, 1)
    merges = []
    while len(merges) < n_merges:
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        for i in list(where[best]):
            count(i, -1)
            word, j = words[i][0], 0
            while j + 1 < len(word):
                if (word[j], word[j + 1]) == best:
                    word[j:j + 2] = [best[0] + best[1]]
                j += 1
            count(i, 1)
    return merges


def make_model_files(documents):
    """tokenizer.json, tokenizer_config.json and config.json of the base model."""
    letters = sorted(byte_letters().values())
    merges = train_bpe(documents, VOCAB_SIZE - len(letters) - len(SPECIAL))
    vocab = letters + [a + b for a, b in merges]
    special = {s: len(vocab) + i for i, s in enumerate(SPECIAL)}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": i, "content": s, **flags} for s, i in special.items()],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Isolated", "invert": False}, byte_level]},
        "post_processor": byte_level, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
                  "end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False,
                  "vocab": {piece: i for i, piece in enumerate(vocab)}, "merges": [a + " " + b for a, b in merges]}}
    tokenizer_config = {
        "tokenizer_class": "Qwen2Tokenizer", "add_bos_token": False, "add_prefix_space": False,
        "bos_token": None, "eos_token": "<|im_end|>", "pad_token": END_OF_TEXT, "unk_token": None,
        "clean_up_tokenization_spaces": False, "model_max_length": 512, "split_special_tokens": False,
        "added_tokens_decoder": {str(i): {"content": s, **flags} for s, i in special.items()},
        "chat_template": "{% for turn in messages %}{{ '<|im_start|>' + turn['role'] + '\\n' + turn['content'] "
                         "+ '<|im_end|>\\n' }}{% endfor %}"
                         "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"}
    config = {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": VOCAB_SIZE,
        "hidden_size": 128, "intermediate_size": 448, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "hidden_act": "silu", "max_position_embeddings": 512, "rope_theta": 10000.0,
        "rms_norm_eps": 1e-06, "initializer_range": 0.02, "attention_dropout": 0.0, "tie_word_embeddings": True,
        "use_sliding_window": False, "use_cache": True, "bos_token_id": None, "eos_token_id": special["<|im_end|>"],
        "pad_token_id": special[END_OF_TEXT], "torch_dtype": "bfloat16"}
    return {"tokenizer.json": tokenizer, "tokenizer_config.json": tokenizer_config, "config.json": config}


# ================================================================================================
# MARK: - Files
# ================================================================================================

def lines(rows):
    return "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)


def main():
    here = os.path.dirname(os.path.abspath(__file__))
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--output", default=os.path.join(here, "..", "examples", "demo"), metavar="DIR")
    args.add_argument("--corpus", metavar="FILE.jsonl", help="write the base model's corpus here")
    args.add_argument("--check", action="store_true", help="write nothing; exit 1 if a committed file differs")
    args = args.parse_args()

    corpus = make_corpus(random.Random(SEED), 6000000)
    held_out = make_corpus(random.Random(SEED + 2), 40000)
    records, train, test = make_person(random.Random(SEED + 1))
    guess = check_person(records, train, test)
    files = {"records.jsonl": lines(records), "train.jsonl": lines(train), "test.jsonl": lines(test)}
    for name, content in make_model_files(corpus[:len(corpus) // 2]).items():
        files["base/" + name] = json.dumps(content, indent=1, ensure_ascii=False) + "\n"

    wrong = 0
    for name, content in files.items():
        path = os.path.join(args.output, *name.split("/"))
        if args.check:
            with open(path, encoding="utf-8", newline="") as f:
                if f.read() != content:
                    print("%s is not what this script makes" % path, file=sys.stderr)
                    wrong = 1
        else:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "w", encoding="utf-8", newline="") as f:
                f.write(content)
    if args.corpus:
        with open(args.corpus, "w", encoding="utf-8", newline="") as f:
            f.write(lines(dict(text=text) for text in corpus))
    print("%d facts, %d questions to learn from, %d held out; the commonest answer of each kind is right for %.1f %%"
          % (len(records), len(train), len(test), 100 * guess))
    return wrong


if __name__ == "__main__":
    sys.exit(main())
