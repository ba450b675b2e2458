"""Answers written by hand: 20 right and 20 wrong ones for each checker."""

import pytest

from kd_jax.lm.instruct import checkers
from kd_jax.lm.instruct.words import CATEGORIES

FRUITS = {"members": CATEGORIES["test"]["fruits"].split()}
BUTTER = {"word": "butter"}
COLD = {"accepted": ["cold", "cool"]}
SORTED = {"items": ["bread", "milk", "sugar"]}
FOUR = {"number": 4}
TEXT = {"text": "The station is near the violin."}

ANSWERS = {
    "name_three": (
        FRUITS,
        [
            "Apple, banana, orange", "apple, banana and orange.", "Three fruits are apples, bananas, and oranges.",
            "1. Apple\n2. Banana\n3. Mango", "- kiwi\n- plum\n- fig", "* Pear\n* Peach\n* Lime",
            "Sure! Here are three fruits: cherries, strawberries, and grapes.", "MANGO, KIWI, FIG",
            "I like papayas, plums and pears.", "apple banana cherry", "Apple; pear; plum", "Apple/pear/plum",
            "Some fruits: **apple**, **pear**, **kiwi**.", "peaches, mangoes, melons", "A lemon, a lime, an orange.",
            "Apple, apple, pear and plum.", "An apple is red. A banana is yellow. A kiwi is green.",
            "Blueberries, raspberries, and watermelon", "Coconut, apricot, pomegranate!", "Grapefruit, grape, fig",
        ],
        [
            "", "apple", "apple, banana", "apple, banana, orange, pear", "cat, dog, horse", "apple, banana, chair",
            "apple, apple, apple", "Three fruits.", "I do not know any fruits.", "carrot, potato, onion",
            "Apple and bananas", "pineapples", "app, ban, ora", "1. Apple\n2. Apple\n3. Pear",
            "apple, banana, orange, grape, pear, kiwi, plum", "bananas, banana, Banana", "one two three",
            "applesauce, bananabread, grapevine", "apple banana cherry " * 20, "Apple, pear\n\nThese are fruits.",
        ],
    ),
    "sentence": (
        BUTTER,
        [
            "I like butter on bread.", "She put the butter on the table.", "Butter is made from milk.",
            "Do you have any butter?", "What a lot of butter!", "  The butter melts in the sun.  ",
            "\"The butter is yellow.\"", "The butter, which was old, smelled bad.",
            "He bought butter, milk and bread.", "There's butter in the kitchen.", "BUTTER IS GOOD FOR CAKES.",
            "We need 2.5 pounds of butter.", "Butter melts very fast.", "Please pass me the butter, John.",
            "The cook's butter is fresh.", "The peanut-free butter tastes like butter.",
            "My mother uses butter; my father uses oil.", "“I love butter,” she said.",
            "The chef (who was French) used butter.", "Is it butter or not?!",
        ],
        [
            "", "butter", "Butter.", "I like bread.", "I like butter on bread", "I like butter. It is good.",
            "The butterfly is on the flower.", "Butter melts fast.", "I like butter.\nI like bread.",
            "The butter is good. The bread is not.", "The buttery bread is good.",
            "Here is a sentence:\nI like butter.", "butter butter butter", "A word: butter",
            "Yes! I like butter on bread.", "The bread is on the table.",
            "The butter is on " + "the table and on " * 20 + "the bread.", "I like but ter on bread.",
            "What is butter? It is made from milk.", "Butters are made from milk.",
        ],
    ),
    "one_word": (
        COLD,
        [
            "cold", "Cold", "COLD", "cold.", "Cold.", "cool", "Cool.", " cold ", "cold\n", "\"cold\"", "\"Cold.\"",
            "'cold'", "**Cold**", "Cold!", "(cold)", "- cold", "“cold”", "cool!", "\n\nCold.", "* Cool *",
        ],
        [
            "", "hot", "It is cold.", "The opposite of hot is cold.", "cold cold", "cold, cool", "colder", "coldness",
            "very cold", "not hot", "warm", "cold or cool", "Answer: cold", "c o l d", "col", "freezing", "ice-cold",
            "Cold. It is cold.", "Sure, cold", "1. cold",
        ],
    ),
    "fact": (
        COLD,
        [
            "cold", "Cold.", "cool", "The opposite of hot is cold.", "It is cold.", "Cold, of course!", "**Cold**",
            "The answer is: cold.", "\"Cold.\"", "I think it's cold", "cold?", "The opposite of hot is \"cold.\"",
            "That would be COOL.", "  It is cold.\n", "The opposite of hot, which is warm, is cold.", "cold or cool",
            "Sure, the opposite of hot is cold!", "It is 10 degrees cold.", "(cold)", "Ice is cold, fire is hot.",
        ],
        [
            "", "hot", "The opposite of hot is warm.", "colder", "Coldness.", "It is cooler.", "c o l d", "freezing",
            "It is cold. Ice is cold.", "Cold! Very cold.", "It is\ncold", "Cold.\n\nIs that right?", "scold",
            "I do not know.", "The opposite of hot is", "It is hot. It is cold.", "What is it? It is cold.",
            "very " * 40 + "cold", "coldcold", "The opposite of hot is cald.",
        ],
    ),
    "sort": (
        SORTED,
        [
            "bread, milk, sugar", "Bread, milk, sugar", "bread, milk, and sugar.", "bread, milk, sugar\n",
            "bread\nmilk\nsugar", "1. bread\n2. milk\n3. sugar", "- bread\n- milk\n- sugar",
            "* Bread\n* Milk\n* Sugar", "Here they are: bread, milk, sugar",
            "Alphabetical order: bread, milk, sugar.", "bread; milk; sugar", "bread -> milk -> sugar",
            "bread < milk < sugar", "BREAD, MILK, SUGAR", "bread,milk,sugar", "  bread, milk, sugar  ",
            "The words in order:\n1. bread\n2. milk\n3. sugar", "bread and milk and sugar",
            "\"bread\", \"milk\", \"sugar\"", "1) bread\n2) milk\n3) sugar\n",
        ],
        [
            "", "bread", "bread, milk", "milk, bread, sugar", "sugar, milk, bread", "bread, sugar, milk",
            "bread, milk, sugar, tea", "bread, bread, milk, sugar", "breads, milk, sugar", "bread, milk, sugars",
            "The words are bread, milk, sugar", "bread, milk, sugar are in order", "bread milk sugar", "a, b, c",
            "1. milk\n2. bread\n3. sugar", "bread, milk, sugar: done", "bread, milk\n\nThat is all, sugar is last",
            "I cannot do that.", "bread, milk, sugar, bread, milk, sugar", "bread, milk, sugarr",
        ],
    ),
    "count": (
        FOUR,
        [
            "4", "four", "Four", "4.", "Four.", "There are 4 words.", "There are four words in this list.",
            "FOUR words", "The answer is 4.", "It has four items.", "The list has 4 items: bread, milk, sugar, tea.",
            "**4**", "four!", "(4)", "I count 4 of them.", "Exactly four.", "The number of words is 4", "\n4\n",
            "= 4", "4 words",
        ],
        [
            "", "5", "three", "There are 3 words.", "There are five words.", "bread, milk, sugar, tea", "4 or 5",
            "1, 2, 3, 4", "four, no, five", "fourteen", "40", "44", "forty", "There are many.",
            "4 words of 5 letters", "1. bread 2. milk 3. sugar 4. tea", "fourth", "4 4", "I don't know.",
            "There are 4 " + "words " * 60,
        ],
    ),
    "copy": (
        TEXT,
        [
            "The station is near the violin.", "The station is near the violin", " The station is near the violin. ",
            "\"The station is near the violin.\"", "'The station is near the violin.'",
            "“The station is near the violin.”", "\"The station is near the violin\".",
            "\nThe station is near the violin.\n", "The station is near the violin.\n\n",
            "\"The station is near the violin\"", "\tThe station is near the violin.",
            "‘The station is near the violin.’", "'The station is near the violin'",
            " 'The station is near the violin.' ", "\n\"The station is near the violin.\"",
            "The station is near the violin. ", "  The station is near the violin",
            "“The station is near the violin”", "‘The station is near the violin’",
            "\r\nThe station is near the violin.\r\n",
        ],
        [
            "", "The", "The station is near the violin!", "the station is near the violin.",
            "The station is near a violin.", "The violin is near the station.",
            "The station is near the violin. The station is near the violin.",
            "Sure! The station is near the violin.", "The station is near the violin and the carpet.",
            "The  station is near the violin.", "The station, is near the violin.", "THE STATION IS NEAR THE VIOLIN.",
            "The station is near the violins.", "station is near the violin.", "The station is near", "You said so.",
            "The text is: The station is near the violin.", "The station is near the violin..",
            "The station isnear the violin.", "“The station” is near the violin.",
        ],
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", checkers.CHECKERS)
def test_answers_written_by_hand(kind):
    arguments, right, wrong = ANSWERS[kind]
    assert len(set(right)) == len(set(wrong)) == 20
    assert [answer for answer in right if not checkers.check(kind, arguments, answer)] == []
    assert [answer for answer in wrong if checkers.check(kind, arguments, answer)] == []


def test_a_repeater_is_wrong_everywhere():
    for kind, (arguments, right, _) in ANSWERS.items():
        assert not checkers.check(kind, arguments, " ".join([right[0]] * 30)), kind


def test_digits_that_are_no_numbers():
    # superscripts and numbers in circles are digits to str.isdigit, and int refuses them
    assert not checkers.is_number("²", 2) and not checkers.is_number("④", 4)
    assert checkers.is_number("It is 4, not 2².", 4) and not checkers.is_number("2² = 4, and not 5.", 4)


def test_plurals_in_ves():
    furniture = ["shelf", "sofa", "table", "desk"]
    assert checkers.names_three("Sofas, tables and shelves.", furniture)
    assert not checkers.names_three("Sofas and shelves, or a shelf.", furniture)
