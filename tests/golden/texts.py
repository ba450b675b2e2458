"""Texts to score, of many kinds; what a file of golden values holds is their ids."""

PROSE = {
    "essay": """\
A lighthouse keeper once told me that the hardest part of the work was not the storms but the calm. In a storm, he
said, there is always something to do: a shutter to fasten, a lamp to trim, a rope that has worked itself loose and
beats against the wall until somebody goes out into the dark and ties it down. In the calm there is only the sea, and
the sea has nothing to say that it did not say yesterday. He kept a notebook in those weeks, and because he had no news
he wrote down the colour of the water, four times a day, for eleven years.

I thought of that notebook again when I began to teach. A class has its storms, of course, and everybody who has stood
in front of one remembers them. But most of the year is calm weather. The same corridor, the same bell, the same child
in the third row who understands everything and says nothing. It is easy to believe that nothing is happening, and to
stop looking. The keeper's colours taught me otherwise. When he read them aloud, page after page, you could hear the
seasons turn. No single line meant much; the difference between one line and the next meant almost everything.

So I started a list of my own. Not marks, which are a kind of storm, but small things: who asked a question without
being asked, who changed a partner, who finished early and looked out of the window, and who finished early and went
back to the first page. After a month the list was dull. After a year it was the most useful book I owned. It told me
that Peter, whom I had thought slow, was careful; that Anna, whom I had thought careful, was afraid; and that on
Thursdays, whatever I did, nobody learned anything after lunch.

There is a moral here about measurement, and it is not the one that people expect. They expect me to say that numbers
are cold and attention is warm. But the keeper's list was made of numbers too, in a way, and it was the warmest thing in
that cold tower. What matters is whether you look at the same thing again, in the same manner, long enough for its own
pattern to show through yours. A thermometer does that. So does a friend. A person who glances once, however kindly,
does not.
""",
    "story": """\
"You cannot sell a river," said the old woman, and she put the cup down so hard that the tea jumped out of it.

"Nobody is selling the river, Grandmother. They are buying the mill."

"And what turns the mill?"

Marten looked at the floor. Through the open door he could hear the wheel, which had gone round for a hundred and forty
years and which would stop, the man from the city had explained, on the first of March. There would be a museum instead.
There would be a car park, and a small shop where visitors could buy flour that had been ground somewhere else.

"Three thousand," he said at last. "That is more than the roof costs. That is the roof, and the winter, and the doctor."

She did not answer. She stood up, slowly, with one hand on the table and one on the dog, and she went to the window. The
light was going. On the far bank two boys were throwing stones at a floating bottle, and each time they missed, the
bottle turned a little, as if it wanted to see who they were.

"Your grandfather proposed to me on that wheel," she said. "He was stuck. His sleeve had caught, and he was going up and
over, up and over, shouting a different sentence each time he came past. I had to put it together by myself."

"And what did it say?"

"It said, 'Open the sluice, you goose.'" She laughed until she coughed. "But I married him anyway."
""",
    "letter": """\
Dear Ms. Okafor,

Thank you for your letter of 14 February. I am sorry to hear that the second parcel arrived damaged as well. We have
found the reason: the new boxes are 2 cm taller than the old ones, and the machine that closes them was never told.
A replacement left our warehouse this morning; you need not return anything. Please accept the enclosed voucher (20 %)
with our apologies.

Yours sincerely,
J. Lindqvist
""",
    "poem": """\
The clock has lost its minute hand,
the cat has lost the mouse,
and snow is falling, grand by grand
piano, on the house.

Who ordered so much quiet? Not
the kettle; it complains.
We drink the little warmth we've got
and listen to the drains.
""",
    "recipe": """\
Lentil soup, for four:
- 250 g red lentils, rinsed
- 1 onion, 2 carrots, 3 cloves of garlic
- 1 tsp cumin; a pinch of chilli
1. Fry the onion until golden (about 8 minutes).
2. Add everything else and 1.2 l of water.
3. Simmer for 25 min, then blend HALF of it.
""",
    "news": "LISBON, 3 May - Trams on the hill line stood still for the second day on Tuesday after a flock of geese "
    'settled between the rails. "They are waiting for the 28," said a driver, who asked not to be named.',
    "question": "Q: Why is the sky dark at night if there are stars in every direction?\nA:",
    "shouting": "WARNING!!! DO NOT OPEN THE VALVE... i repeat: dO nOt OpEn ThE vAlVe!?!? #safety @everyone",
    "two tokens": "Good morning",
    "one token": "The",
}

CODE = {
    "python": '''\
from __future__ import annotations

import heapq
from collections import defaultdict


class Graph:
    """A directed graph with a cost on each edge."""

    def __init__(self, edges: list[tuple[str, str, float]]):
        self._out: dict[str, list[tuple[str, float]]] = defaultdict(list)
        for start, end, cost in edges:
            if cost < 0:
                raise ValueError(f"edge {start}->{end} has cost {cost:.2f} < 0")
            self._out[start].append((end, cost))

    def shortest(self, source: str, target: str) -> float | None:
        queue, done = [(0.0, source)], set()
        while queue:
            cost, node = heapq.heappop(queue)
            if node == target:
                return cost
            if node in done:
                continue
            done.add(node)
            for neighbour, step in self._out[node]:
                if neighbour not in done:
                    heapq.heappush(queue, (cost + step, neighbour))
        return None  # there is no way


if __name__ == "__main__":
    graph = Graph([("a", "b", 1.5), ("b", "c", 2), ("a", "c", 10)])
    assert graph.shortest("a", "c") == 3.5, "the detour is cheaper"
    print(*sorted(graph._out), sep="\\n")
''',
    "c": """\
#include <stdint.h>
#include <stdio.h>

/* Counts the bits that are set, four at a time. */
static int count_bits(uint32_t x)
{
\tstatic const uint8_t table[16] = { 0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4 };
\tint n = 0;
\tfor (; x != 0; x >>= 4)
\t\tn += table[x & 0xF];
\treturn n;
}

int main(void)
{
\tprintf("%d\\n", count_bits(0xDEADBEEFu));
\treturn 0;
}
""",
    "json": """\
{"id": 40817, "name": "sensor-7b", "on": true, "parent": null, "position": {"lat": 59.3293, "lon": -18.0686e0},
 "readings": [[0, 21.5], [60, 21.75], [120, 2.2e1]], "tags": ["roof", "north \\u00e9tage", "c:\\\\tmp"], "notes": ""}
""",
    "sql": """\
WITH late AS (
    SELECT o.customer_id, COUNT(*) AS n, MAX(o.shipped_at - o.due_at) AS worst
    FROM orders AS o
    WHERE o.shipped_at > o.due_at AND o.status <> 'cancelled'
    GROUP BY o.customer_id
    HAVING COUNT(*) >= 3
)
SELECT c.name, late.n, late.worst
FROM customers AS c JOIN late ON late.customer_id = c.id ORDER BY late.n DESC LIMIT 10;
""",
    "shell": "for f in *.log; do grep -c 'ERROR' $f | awk -v n=$f '{ print n, $1 }'; done 2>/dev/null | sort -rn",
    "html": '<ul class="menu">\n  <li><a href="/?page=2&amp;sort=asc">Next &raquo;</a></li>\n</ul>\n<!-- end -->\n',
    "latex": "\\begin{equation}\n  \\int_0^\\infty e^{-x^2}\\,dx = \\frac{\\sqrt{\\pi}}{2}\n\\end{equation}\n",
}

SCRIPTS = {
    "chinese": "昨天下午，我们在河边等了三个小时，船一直没有来。老人说，春天的水太急，船夫不敢过河。于是我们生了火，"
    "烤了几个红薯，一边吃一边听他讲年轻时候的故事。天黑以前，对岸终于亮起了一盏灯。",
    "arabic": "في صباح يوم بارد خرج الطفل ليبحث عن قطته الصغيرة. سأل البائع في السوق وسأل الجارة العجوز، "
    "لكن أحداً لم يرها. وعندما عاد إلى البيت وجدها نائمة فوق كتبه.",
    "hindi": "बारिश रुकने के बाद गाँव की सड़क पर बच्चे फिर से खेलने लगे। दादी ने कहा कि चाय तैयार है, पर किसी ने नहीं सुना।",
    "russian": "Поезд опоздал на сорок минут, и никто на платформе не удивился. Дежурная вынесла чайник, кто-то достал "
    "пирожки с капустой, а мальчик в красной шапке громко считал вагоны товарного состава: «сто два, сто три...»",
    "thai": "เมื่อวานฝนตกหนักทั้งคืน ถนนหน้าบ้านน้ำท่วมจนรถผ่านไม่ได้ คุณยายหัวเราะแล้วบอกว่าปลาจะมาเคาะประตู",
    "japanese": "駅前の小さな本屋は、来月で閉まるそうです。カメラを持って、最後の写真を撮りに行きました。",
    "korean": "할머니는 매일 아침 같은 벤치에 앉아 비둘기에게 빵을 나누어 주었다.",
    "greek": "Το καφενείο άνοιγε στις έξι, πριν ακόμα ξημερώσει.",
    "accents": "Señor Ångström naïvely café-hopped from Çeşme to Łódź; œuvre, fjord, ħ, ½, ≠, “quotes” – and so on…",
}

OTHER = {
    "emoji": "🎉🎉 Happy birthday Zoë!!! 🥳🎂 See you at 🏖️ on 🗓️ Friday? 👩‍👩‍👧‍👦 👍🏽 🇳🇴 ❤️‍🔥 :-) ¯\\_(ツ)_/¯ 🙈🙉🙊",
    "numbers": "3.14159265358979 2,718,281,828 -0.000123 6.02e23 0xFF 0b1011 1/3 50% $1,299.99 2024-02-29T23:59:60Z "
    "192.168.0.1 +47 22 33 44 55 ISBN 978-0-00-000000-2 1 1 2 3 5 8 13 21 34 55 89 144 233 377 610",
    "table": "n\tn^2\tn^3\n" + "".join(f"{n}\t{n**2}\t{n**3}\n" for n in range(1, 13)),
    "chat": "<|im_start|>system\nYou answer in one sentence.<|im_end|>\n<|im_start|>user\nWhat is a tide?<|im_end|>\n"
    "<|im_start|>assistant\nA tide is the slow rise and fall of the sea that moon and sun bring about.<|im_end|>\n"
    "<|im_start|>user\nAnd a neap tide?<|im_end|>\n<|im_start|>assistant\n",
    "documents": "First page.<|endoftext|>Second page.<|endoftext|><|endoftext|><repo_name>a/b<|im_end|><|im_end|>",
    "whitespace": f"a{' ' * 37}b\n\n\n\n\t\t\tc \n \n  \n" + "\t" * 20 + "d\r\n\r\n" + "\n" * 40 + " e\u00a0\u2003f ",
    "stutter": "ha" * 30 + " " + "no, " * 25 + "=" * 50 + "." * 33,
    "odd bytes": "\x00\x01\x7f\x1b[31m\u200b\u202e\ufeff\ufffd𝔘𝔫𝔦𝔠𝔬𝔡𝔢 Z̷̢͑a̸̡̚l̵͉̈g̷̱̀ỏ̵̤ ꧁꧂",
}

TEXTS = {**PROSE, **CODE, **SCRIPTS, **OTHER}

# Each is carried on for 64 tokens by taking the most probable one.
PROMPTS = (
    "def fibonacci(n):\n",
    "<|im_start|>user\nName three rivers in Europe.<|im_end|>\n<|im_start|>assistant\n",
    "1, 2, 4, 8, 16,",
    "The opposite of hot is",
    "Water boils at",
    "Le chat est",
    "#include <stdio.h>\n\nint main(",
    "月",
)
