"""Text of the toy world: short chats that we generate ourselves.

A *unit* is one exchange: a user message, the assistant's reply and, for tools, the tool result and the reply
after it. A *chat* is an optional system message, optional tools and one or more units. Every unit has a key;
a key whose checksum falls into the held-out tenth never appears in training, so `heldout.jsonl` asks for
combinations (of numbers, names, places, ...) that the model has not seen.
"""

import json
import random
import re
import zlib
from pathlib import Path

import jinja2

HERE = Path(__file__).resolve().parent

NAMES = """Asha Ravi Annie Kiran Meera Arjun Lena Tom Maria Priya Sam Nina Omar Lucy Dev Ines Paul Rosa Vikram Leela
Hans Greta Anil Sara Jonas Maya Felix Tara Emil Zoya Bruno Clara Nikhil Diya Oscar Ruth Hugo Isha Karl Uma""".split()
SURNAMES = "Rao Kumar Smith Weber Nair Lopez Iyer Brown Silva Novak Das Berg".split()
PLACES = """Mysuru Berlin Paris Chennai London Goa Delhi Rome Oslo Pune Kochi Vienna Lisbon Madrid Mumbai Zurich
Prague Dublin Athens Jaipur Hampi Boston Tokyo Cairo Bergen Munich""".split()
JOBS = "teacher doctor baker nurse farmer driver singer painter writer tailor pilot cook".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
FOODS = "rice dosa bread soup mango curry pasta salad cake tea apples cheese".split()
THINGS = "mangoes apples books coins pens cups eggs shells stamps keys".split()
GOODS = "rice gold tea milk silk petrol onions coffee bikes phones lamps shoes".split()
TOPICS = """cricket football elections space robots music cinema chess farming solar power electric cars
birds""".split()
SKY = ["Light rain", "Heavy rain", "Sunny", "Cloudy", "Windy", "Foggy", "Clear sky"]
WEATHER = "rain weather snow wind fog storms".split()
ROOMS = ["kitchen", "garden", "blue box", "car", "desk", "bedroom", "red bag", "hall"]
OWN = ["keys", "doctor", "passport", "glasses", "wallet", "bike", "tickets", "medicine"]
EVENTS = ["picnic", "wedding", "party", "exam", "meeting", "concert", "school trip", "holiday"]
OF_PERSON = ["birthday", "garden", "new job", "phone", "house", "wedding", "dog", "sister"]

SYSTEMS = ["You are a helpful assistant.", "You are Annie's helper.", "Be brief.", "You help Annie's family.",
           "You are a friendly assistant. Keep answers short."]

ODD = ["Write a poem about the sea.", "Tell me a joke.", "Translate this into French.", "Paint a picture.",
       "Explain quantum physics.", "Write a story.", "What is the meaning of life?", "Sing a song.",
       "Write a Rust program.", "Why is the sky blue?", "Play chess with me.", "Summarise this book.",
       "Who wrote Hamlet?", "Give me advice.", "Make a plan for my week.", "What is love?"]


def made_up(r):
    """A name nobody has: keeps the model copying letters instead of knowing a list."""
    parts = [r.choice("BDFGHJKLMNPRSTVZ").lower() + r.choice("aeiou") + r.choice(["", "", "n", "r", "l", "s"])
             for _ in range(2)]
    return "".join(parts).capitalize()


def name(r):
    return made_up(r) if r.random() < 0.1 else r.choice(NAMES)


def place(r):
    return made_up(r) if r.random() < 0.06 else r.choice(PLACES)


def is_held(key):
    return zlib.crc32(key.encode()) % 10 == 0


# ---- tools --------------------------------------------------------------------------------------------------------

def tool_definitions(style):
    """The three tools; `style` chooses the wording, None leaves the descriptions out."""
    say = {
        0: ["Search the web.", "The search query.", "Search the memories.", "What to look for.",
            "How many at most.", "Get the details of a person.", "The name."],
        1: ["Search the public web for facts and news.", "Search terms.",
            "Search what the user told you before.", "Search terms.", "Number of results.",
            "Details of a known person or thing.", "Name of the entity."],
    }.get(style)

    def prop(kind, text):
        return {"type": kind, "description": text} if text else {"type": kind}

    def tool(tool_name, text, props, required):
        fn = {"name": tool_name}
        if text:
            fn["description"] = text
        fn["parameters"] = {"type": "object", "properties": props, "required": required}
        return {"type": "function", "function": fn}

    t = say or [None] * 7
    return [
        tool("web_search", t[0], {"query": prop("string", t[1])}, ["query"]),
        tool("search_memory", t[2], {"query": prop("string", t[3]), "limit": prop("integer", t[4])}, ["query"]),
        tool("get_entity_details", t[5], {"name": prop("string", t[6])}, ["name"]),
    ]


# ---- units --------------------------------------------------------------------------------------------------------

def unit(family, key, user, thought, answer=None, call=None, after=None, **expect):
    """One exchange. `after` is (tool text, thought, answer) for a call."""
    return dict(family=family, key=key, user=user, thought=thought, answer=answer, call=call, after=after,
                expect=expect)


def greeting(r):
    ask = "How can I help you?"
    kind = r.random()
    if kind < 0.5:
        who = name(r)
        word, back = r.choice([("Hello", "Hello"), ("Hi", "Hello"), ("Hey", "Hello"), ("Good morning", "Good morning"),
                               ("Good evening", "Good evening"), ("Good afternoon", "Good afternoon")])
        tail = r.choice([f"I am {who}.", f"my name is {who}.", f"this is {who}.", f"I am {who}", f"I'm {who}."])
        user = r.choice([f"{word}, {tail}", f"{word}! {tail[0].upper()}{tail[1:]}"])
        return unit("greeting", f"greet {user}", user, f"The user is {who}. I greet {who}.",
                    f"{back} {who}! {ask}", named=True)
    table = [
        (["Hello!", "Hello", "Hi!", "Hi", "Hi there!", "Hey!", "Hello there!", "hello", "hi"],
         "The user says hello. I greet back.", f"Hello! {ask}"),
        (["Good morning!", "Good morning"], "A morning greeting. I greet back.", f"Good morning! {ask}"),
        (["Good evening!", "Good evening"], "An evening greeting. I greet back.", f"Good evening! {ask}"),
        (["Thank you!", "Thanks!", "Thank you very much.", "thanks"], "The user thanks me.", "You are welcome!"),
        (["Goodbye!", "Bye!", "See you!"], "The user leaves.", "Goodbye!"),
        (["How are you?", "How are you today?"], "The user asks how I am.", f"I am fine, thank you. {ask}"),
        (["Who are you?", "What are you?", "What is your name?"], "The user asks who I am.",
         "I am Ferrotron Tiny, a toy model."),
    ]
    users, thought, answer = r.choice(table[:1] * 4 + table)
    user = r.choice(users)
    return unit("greeting", None, user, thought, answer)


def sum_thought(a, b):
    ones = a % 10 + b % 10
    text = f"ones {a % 10}+{b % 10}={ones}"
    carry = ones // 10
    if carry:
        text += " carry 1"
    tens = a // 10 + b // 10 + carry
    return f"{text}, tens {a // 10}+{b // 10}{'+1' if carry else ''}={tens}, result {a + b}"


def difference_thought(a, b):
    borrow = a % 10 < b % 10
    ones = a % 10 + 10 * borrow
    text = f"ones {ones}-{b % 10}={ones - b % 10}"
    if borrow:
        text += " borrow 1"
    return f"{text}, tens {a // 10}-{b // 10}{'-1' if borrow else ''}={a // 10 - b // 10 - borrow}, result {a - b}"


def arithmetic(r, think=True):
    kind = r.random()
    if kind < 0.08:
        a, b = r.randint(0, 10), r.randint(0, 10)
        user = r.choice([f"What is {a} x {b}?", f"What is {a} times {b}?", f"{a} x {b} = ?"])
        return unit("arithmetic", None, user, f"{a}x{b}={a * b}, result {a * b}", f"{a} x {b} = {a * b}.")
    top = 99 if think else 20
    a, b = r.randint(0, top), r.randint(0, top)
    if r.random() < 0.2:
        b = r.randint(0, 9)
    if r.random() < (0.1 if think else 0.4):
        a, b = r.randint(0, 9), r.randint(0, 9)
    plus = kind < 0.58
    if not plus and a < b:
        a, b = b, a
    c = a + b if plus else a - b
    thought = sum_thought(a, b) if plus else difference_thought(a, b)
    key = f"sum {a} {b}" if plus else f"minus {a} {b}"
    if a < 10 and b < 10:
        key = None          # the table of small numbers is there to be learnt by heart
    if r.random() < 0.3:
        who, what = name(r), r.choice(THINGS)
        if plus:
            user = r.choice([f"{who} has {a} {what} and gets {b} more. How many {what} does {who} have?",
                             f"{who} has {a} {what} and buys {b} more. How many now?"])
        else:
            user = r.choice([f"{who} has {a} {what} and gives {b} away. How many {what} are left?",
                             f"{who} has {a} {what} and loses {b}. How many now?"])
        return unit("arithmetic", key, user, thought, f"{who} has {c} {what}.")
    if plus:
        user = r.choice([f"What is {a} + {b}?", f"What is {a} + {b}?", f"{a} + {b} = ?", f"Add {a} and {b}.",
                         f"What is {a} plus {b}?", f"Calculate {a} + {b}.", f"{a} + {b}", f"How much is {a} + {b}?"])
        answer = f"{a} + {b} = {c}."
    else:
        user = r.choice([f"What is {a} - {b}?", f"What is {a} - {b}?", f"{a} - {b} = ?", f"Subtract {b} from {a}.",
                         f"What is {a} minus {b}?", f"Calculate {a} - {b}.", f"{a} - {b}", f"How much is {a} - {b}?"])
        answer = f"{a} - {b} = {c}."
    return unit("arithmetic", key, user, thought, answer)


def extraction(r):
    p, p2, pl = name(r), r.choice(NAMES), place(r)
    job, day, food, age = r.choice(JOBS), r.choice(DAYS), r.choice(FOODS), r.randint(2, 99)
    text, fields = r.choice([
        (f"{p} lives in {pl}.", {"person": p, "place": pl}),
        (f"{p} lives in {pl} and works as a {job}.", {"person": p, "place": pl, "job": job}),
        (f"{p} is a {job} in {pl}.", {"person": p, "job": job, "place": pl}),
        (f"{p} met {p2} in {pl} on {day}.", {"people": [p, p2], "place": pl, "day": day}),
        (f"{p} eats {food} in {pl}.", {"person": p, "food": food, "place": pl}),
        (f"{p} is {age} years old and lives in {pl}.", {"person": p, "age": age, "place": pl}),
        (f"{p} travels to {pl} on {day}.", {"person": p, "place": pl, "day": day}),
        (f"On {day} {p} buys {food}.", {"day": day, "person": p, "food": food}),
        (f"{p} and {p2} live in {pl}.", {"people": [p, p2], "place": pl}),
    ])
    if r.random() < 0.4:
        keys = list(fields)
        if len(keys) > 2 and r.random() < 0.5:
            keys.pop(r.randrange(len(keys)))
        fields = {k: fields[k] for k in keys}
        listed = ", ".join(keys[:-1]) + " and " + keys[-1]
        user = f"Extract {listed} as JSON: {text}"
    else:
        user = r.choice(["Extract the entities as JSON: ", "Extract JSON: ", "Give me JSON for: ",
                         "Extract the data as JSON: "]) + text
    thought = ", ".join(f"{k} {' and '.join(v) if isinstance(v, list) else v}" for k, v in fields.items())
    return unit("extraction", f"extract {user}", user, thought, json.dumps(fields, ensure_ascii=False))


def nothing(r, q):
    return (r.choice(["No results.", '{"results": []}']), "Nothing was found.", f"I found nothing about {q}.")


def found(r, text):
    shown = text if r.random() < 0.6 else json.dumps({"results": [text]}, ensure_ascii=False)
    return (shown, "I have a result.", text)


def use_web(r):
    pl, good, topic = place(r), r.choice(GOODS), r.choice(TOPICS)
    n, w = r.randint(2, 99), r.choice(WEATHER)
    q, fact, asks = r.choice([
        (f"{w} in {pl}", f"{r.choice(SKY)} in {pl}, {r.randint(2, 39)} degrees.", [f"Is there {w} in {pl}?"]
         if w != "weather" else [f"What is the weather in {pl}?", f"How is the weather in {pl}?"]),
        (f"weather in {pl}", f"{r.choice(SKY)} in {pl}, {r.randint(2, 39)} degrees.",
         [f"What is the weather in {pl}?", f"How is the weather in {pl}?"]),
        (f"price of {good}", f"The price of {good} is {n} rupees.", [f"What is the price of {good} today?"]),
        (f"price of {good} in {pl}", f"The price of {good} in {pl} is {n} rupees.",
         [f"What is the price of {good} in {pl}?"]),
        (f"news about {topic}", f"There is much news about {topic}.", [f"What is the news about {topic}?",
                                                                     f"Is there news about {topic}?"]),
        (f"trains to {pl}", f"The next train to {pl} leaves at {r.randint(1, 12)} pm.", []),
        (f"hotels in {pl}", f"A hotel in {pl} costs {n} rupees.", []),
        (f"{topic} in {pl}", f"{pl} has a big {topic} club.", []),
    ])
    user = r.choice([f"Search the web for {q}", f"Search the web for {q}.", f"Look up {q} online.",
                     f"Find {q} on the web.", f"Please search the web for {q}."] + asks * 2)
    after = nothing(r, q) if r.random() < 0.12 else found(r, fact)
    key = None if q in (f"price of {good}", f"news about {topic}") else f"tool {q}"     # short lists: training only
    return unit("tool", key, user, f"I search the web for {q}.", call=("web_search", {"query": q}),
                after=after)


def use_memory(r):
    who, pl = name(r), place(r)
    of, own, event = r.choice(OF_PERSON), r.choice(OWN), r.choice(EVENTS)
    q, fact = r.choice([
        (f"{who}'s birthday", f"{who}'s birthday is on {r.randint(1, 28)} {r.choice(MONTHS)}."),
        (f"{who}'s {of}", f"{who}'s {of} is in {pl}." if of in ("garden", "new job", "house", "wedding") else
         f"{who} talked about the {of} on {r.choice(DAYS)}."),
        (f"my {own}", f"Your {own} is in the {r.choice(ROOMS)}."),
        (f"the {event}", f"The {event} is on {r.choice(DAYS)}."),
        (f"the {event} in {pl}", f"The {event} in {pl} is on {r.choice(DAYS)}."),
        (f"the trip to {pl}", f"The trip to {pl} is in {r.choice(MONTHS)}."),
    ])
    args = {"query": q}
    if r.random() < 0.25:
        args["limit"] = r.randint(2, 9)
        user = r.choice([f"Find {args['limit']} memories about {q}.", f"Show {args['limit']} memories about {q}."])
        thought = f"I search memory for {q}, limit {args['limit']}."
    else:
        user = r.choice([f"What do you remember about {q}?", f"Search your memory for {q}.",
                         f"What did I say about {q}?", f"Do you remember {q}?", f"What did I tell you about {q}?"])
        thought = f"I search memory for {q}."
    after = nothing(r, q) if r.random() < 0.12 else found(r, fact)
    key = None if q in (f"my {own}", f"the {event}") else f"tool {q} {args.get('limit', '')}"
    return unit("tool", key, user, thought, call=("search_memory", args), after=after)


def use_entity(r):
    who = name(r)
    if r.random() < 0.5:
        who += " " + r.choice(SURNAMES)
    pl, job = place(r), r.choice(JOBS)
    user = r.choice([f"Who is {who}?", f"Tell me about {who}.", f"Show the details of {who}.",
                     f"What do you know about {who}?", f"Get the details of {who}.", f"Give me details about {who}."])
    kind = r.random()
    if kind < 0.12:
        after = nothing(r, who)
    elif kind < 0.6:
        card = {"name": who, "city": pl, "job": job}
        after = (json.dumps(card, ensure_ascii=False), "I have the details.", f"{who} is a {job} in {pl}.")
    elif kind < 0.8:
        after = (json.dumps({"name": who, "city": pl}, ensure_ascii=False), "I have the details.",
                 f"{who} lives in {pl}.")
    else:
        after = (json.dumps({"name": who, "job": job}, ensure_ascii=False), "I have the details.",
                 f"{who} is a {job}.")
    return unit("tool", f"tool {user} {who}", user, f"I need the details of {who}.",
                call=("get_entity_details", {"name": who}), after=after)


def odd(r):
    return unit("fallback", None, r.choice(ODD), "I cannot do this.", "I am a toy model and cannot do that.")


def no_tool(r):
    u = r.choice([use_web, use_memory, use_entity])(r)
    return unit("fallback", u["key"], u["user"], "I have no tool for this.", "I have no tool for that.")


def tool_unit(r):
    return r.choice([use_web, use_memory, use_entity])(r)


def draw(make, r, held, **kw):
    """A unit on the wished side of the split. Units without a key belong to training only."""
    while True:
        u = make(r, **kw)
        if u["key"] is None and held:
            continue
        if u["key"] is None or is_held(u["key"]) == held:
            return u


# ---- chats --------------------------------------------------------------------------------------------------------

def messages_of(u, think, stop_before=None):
    """The messages of a unit; `stop_before` 'first' or 'last' leaves out that assistant turn and what follows."""
    out = [{"role": "user", "content": u["user"]}]
    if stop_before == "first":
        return out

    def assistant(thought, content, call=None):
        m = {"role": "assistant", "content": content}
        if think:
            m["reasoning_content"] = thought
        if call:
            m["tool_calls"] = [{"type": "function", "function": {"name": call[0], "arguments": call[1]}}]
        return m

    out.append(assistant(u["thought"], u["answer"] or "", u["call"]))
    if u["call"]:
        out.append({"role": "tool", "content": u["after"][0]})
        if stop_before != "last":
            out.append(assistant(u["after"][1], u["after"][2]))
    return out


def system_message(r):
    return [] if r.random() < 0.6 else [{"role": "system", "content": r.choice(SYSTEMS)}]


def tool_set(r):
    tools = tool_definitions(r.choice([0, 0, 1, None]))
    if r.random() < 0.4:
        r.shuffle(tools)
    return tools


def training_chat(r, with_tools, long):
    """A request dictionary as the template wants it, all turns answered."""
    mode = r.random()
    think = mode < 0.62
    keep = think and long and mode < 0.45           # thoughts of earlier turns stay: every turn can be trained
    turns = (r.randint(4, 7) if keep or not think else r.randint(1, 4)) if long else 1
    messages = system_message(r)
    for turn in range(turns):
        pick = r.random()
        if with_tools:
            make = tool_unit if pick < 0.74 else greeting if pick < 0.82 else arithmetic if pick < 0.9 else \
                extraction if pick < 0.97 else odd
        else:
            make = greeting if pick < 0.12 else arithmetic if pick < 0.62 else extraction if pick < 0.93 else \
                no_tool if pick < 0.97 else odd
        u = draw(make, r, False, **({"think": think} if make is arithmetic else {}))
        # without `keep` the template cuts earlier thoughts; many clients do not even send them back
        earlier = turn < turns - 1 and not keep and r.random() < 0.5
        messages += messages_of(u, think and not earlier)
    chat = {"messages": messages, "enable_thinking": think}
    if with_tools:
        chat["tools"] = tool_set(r)
    if keep:
        chat["truncate_history_thinking"] = False
    return chat


# ---- rendering ----------------------------------------------------------------------------------------------------

def template():
    env = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    env.filters["tojson"] = lambda v: json.dumps(v, ensure_ascii=False)
    return env.from_string((HERE / "chat_template.jinja").read_text())


TURN = re.compile(r"<\|im_start\|>assistant\n(<think>\n|<think></think>)(.*?<\|im_end\|>)", re.S)


def render_training(tpl, chat):
    """Text of a finished chat and the character spans the assistant would have generated."""
    text = tpl.render(**chat)
    wanted = "<think>\n" if chat["enable_thinking"] else "<think></think>"
    spans = [m.span(2) for m in TURN.finditer(text) if m.group(1) == wanted]
    return text, spans


def render_request(tpl, request):
    """The prompt of a request in the form of heldout.jsonl."""
    return tpl.render(messages=request["messages"], add_generation_prompt=True,
                      **({"tools": request["tools"]} if request.get("tools") else {}),
                      **request.get("chat_template_kwargs", {}))


# ---- held-out requests --------------------------------------------------------------------------------------------

def heldout(seed=20240607):
    r = random.Random(seed)
    rows = []

    def add(family, u, think, tools, stop="first"):
        messages = system_message(r)
        if r.random() < 0.15:
            messages += messages_of(draw(greeting, r, True), False)
        messages += messages_of(u, think, stop)
        request = {"messages": messages}
        if tools:
            request["tools"] = tool_definitions(0)
        if not think:
            request["chat_template_kwargs"] = {"enable_thinking": False}
        if stop == "last":
            expect = {"content": u["after"][2]}
        elif u["call"]:
            expect = {"tool": {"name": u["call"][0], "arguments": u["call"][1]}}
        elif u["family"] == "extraction":
            expect = {"json": json.loads(u["answer"])}
        else:
            expect = {"content": u["answer"]}
        rows.append({"family": family, "request": request, "expect": expect})

    for i in range(30):
        add("greeting", draw(greeting, r, True), i % 3 != 2, i % 5 == 4)
    for i in range(45):
        add("arithmetic", draw(arithmetic, r, True, think=True), True, i % 15 == 14)
    for i in range(15):
        add("arithmetic-direct", draw(arithmetic, r, True, think=False), False, False)
    for i in range(40):
        add("extraction", draw(extraction, r, True), i % 3 != 2, i % 20 == 19)
    for i in range(45):
        add("tool-call", draw([use_web, use_memory, use_entity][i % 3], r, True), i % 9 < 6, True)
    for i in range(30):
        add("after-tool", draw([use_web, use_memory, use_entity][i % 3], r, True), i % 9 < 6, True, "last")
    return rows


if __name__ == "__main__":
    path = HERE / "heldout.jsonl"
    with path.open("w") as f:
        for row in heldout():
            f.write(json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n")
    print(path.name, path.stat().st_size, "bytes")
