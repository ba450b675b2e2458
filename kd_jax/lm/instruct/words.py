"""The words that templates are filled with, by split: no category, noun or question of one split is in another."""

CATEGORIES = {
    "train": {
        "animals": "dog cat horse cow pig sheep goat lion tiger bear elephant monkey rabbit mouse rat fox wolf deer "
        "giraffe zebra snake frog bird fish duck chicken kangaroo panda whale dolphin shark eagle owl penguin turtle",
        "colors": "red blue green yellow orange purple pink brown black white gray grey violet indigo turquoise gold "
        "silver beige maroon teal cyan magenta",
        "sports": "soccer football basketball baseball tennis golf hockey volleyball swimming rugby cricket boxing "
        "cycling running skiing badminton wrestling gymnastics surfing softball",
        "countries": "france germany spain italy china japan india brazil canada mexico russia australia egypt kenya "
        "nigeria england sweden norway greece turkey argentina peru chile poland portugal vietnam thailand",
        "tools": "hammer screwdriver wrench saw drill pliers shovel axe rake chisel ladder level file spade knife",
        "drinks": "water tea coffee milk juice soda beer wine lemonade cocoa cola smoothie",
        "body parts": "head arm leg hand foot eye ear nose mouth finger toe knee elbow shoulder neck back stomach hair",
        "jobs": "teacher doctor nurse lawyer engineer farmer chef police firefighter pilot writer artist scientist "
        "carpenter plumber electrician dentist driver baker singer actor soldier",
    },
    "validation": {
        "vegetables": "carrot potato tomato onion pepper broccoli spinach lettuce cabbage cucumber celery pea bean "
        "corn garlic cauliflower kale zucchini eggplant pumpkin radish beet asparagus",
        "vehicles": "car truck bus bicycle bike motorcycle train plane airplane boat ship van taxi tractor scooter "
        "helicopter subway tram",
        "musical instruments": "piano guitar violin drum flute trumpet saxophone cello harp clarinet trombone tuba "
        "banjo organ oboe viola",
        "pieces of clothing": "shirt pants dress skirt jacket coat hat shoe sock sweater scarf glove belt jeans suit "
        "tie blouse shorts t-shirt",
    },
    "test": {
        "fruits": "apple banana orange grape strawberry pear peach mango pineapple lemon lime cherry watermelon kiwi "
        "plum blueberry raspberry papaya grapefruit apricot fig melon coconut pomegranate",
        "flowers": "rose tulip daisy lily sunflower orchid carnation daffodil violet iris lavender marigold peony "
        "poppy lotus jasmine dandelion hydrangea lilac",
        "planets": "mercury venus earth mars jupiter saturn uranus neptune",
        "pieces of furniture": "table chair sofa couch bed desk shelf bookcase dresser cabinet stool bench wardrobe "
        "lamp armchair nightstand",
        "languages": "english spanish french german italian chinese mandarin japanese korean russian arabic hindi "
        "portuguese dutch greek turkish swedish latin polish bengali",
        "metals": "iron gold silver copper aluminum tin lead zinc nickel platinum steel titanium bronze brass mercury",
    },
}

NOUNS = {
    "train": "river garden teacher window mountain letter kitchen bridge picture doctor island bottle candle forest "
    "market pencil rabbit summer ticket village apple bird boat book box bread brother cake camera chair church city "
    "clock cloud coffee computer country dinner door dress driver farm father finger fire fish floor flower friend "
    "game glass gold grass hat horse hospital hotel house king lake lamp leaf machine map milk money moon morning "
    "mother museum music newspaper night nurse paper park party phone piano pilot plate queen rain ring road roof room "
    "rope salt sand sea ship shirt shoe shop singer sister sky snow song soup spoon star stone store storm street "
    "student sugar sun table tea train tree uncle wall watch water wind woman wood yard".split(),
    "validation": "ocean basket winter school blanket farmer castle mirror hammer library cousin desert envelope "
    "helmet jungle".split(),
    "test": "dragon butter station planet feather pocket sailor thunder violin umbrella carpet engine airport balloon "
    "button canyon curtain elephant factory guitar harbor jacket lantern meadow".split(),
}

# Questions with one word as their answer, and the words that are accepted.
FACTS = {
    "train": {
        "the opposite of hot": "cold cool", "the opposite of big": "small little tiny", "the opposite of up": "down",
        "the opposite of day": "night", "the opposite of happy": "sad unhappy", "the capital of France": "Paris",
        "the capital of Italy": "Rome", "the color of grass": "green", "the color of snow": "white",
        "the opposite of old": "young new", "the capital of England": "London", "the color of coal": "black",
        "the opposite of good": "bad evil", "the opposite of long": "short", "the opposite of early": "late",
        "the opposite of love": "hate hatred", "the opposite of high": "low", "the opposite of in": "out",
        "the capital of China": "Beijing", "the capital of Canada": "Ottawa", "the capital of Greece": "Athens",
        "the capital of Austria": "Vienna", "the capital of Ireland": "Dublin", "the capital of Sweden": "Stockholm",
        "the color of milk": "white", "the color of a ripe tomato": "red", "the color of a leaf": "green",
        "the largest ocean": "Pacific", "the first month of the year": "January", "the day after Monday": "Tuesday",
    },
    "validation": {
        "the opposite of fast": "slow", "the opposite of open": "closed shut close", "the capital of Spain": "Madrid",
        "the color of blood": "red", "the opposite of left": "right", "the capital of Japan": "Tokyo",
        "the opposite of war": "peace", "the capital of Portugal": "Lisbon", "the color of a lemon": "yellow",
        "the last month of the year": "December",
    },
    "test": {
        "the opposite of wet": "dry", "the opposite of rich": "poor", "the capital of Germany": "Berlin",
        "the color of a ripe banana": "yellow", "the opposite of light": "dark heavy",
        "the capital of Russia": "Moscow", "the opposite of strong": "weak",
        "the color of the sky on a clear day": "blue", "the capital of Egypt": "Cairo",
        "the opposite of full": "empty hungry", "the opposite of true": "false untrue",
        "the opposite of near": "far", "the capital of Norway": "Oslo", "the capital of Poland": "Warsaw",
        "the color of a carrot": "orange", "the day after Friday": "Saturday", "the opposite of black": "white",
        "the capital of Cuba": "Havana", "the largest planet": "Jupiter", "the color of a frog": "green",
    },
}  # fmt: skip
