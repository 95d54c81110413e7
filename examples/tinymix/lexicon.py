"""Words and sentence patterns of the valley, the small world that tinymix is taught.

Data only: `world.py` draws from it. Every row carries English and Chinese side by side, so that both
languages tell of the same people, places and things. A pattern's `{slots}` are filled by `world.py`.
"""

from typing import Final

# A name is one first and one last syllable; each has its Chinese character.
FIRST_SYLLABLES: Final = (
    ("Wil", "威"), ("Mi", "米"), ("Tor", "托"), ("Ka", "卡"), ("Sel", "塞"), ("Da", "达"), ("Lo", "洛"), ("Bru", "布"),
    ("Nel", "尼"), ("Ve", "维"), ("Jo", "乔"), ("Til", "提"), ("Ro", "罗"), ("In", "英"), ("Fe", "菲"), ("Pe", "佩"),
    ("Hu", "胡"), ("San", "桑"), ("Ma", "马"), ("Do", "杜"), ("El", "埃"), ("Gre", "格"), ("Yu", "尤"), ("Ar", "阿"),
    ("Ce", "策"), ("Na", "纳"), ("Ot", "欧"), ("Pau", "保"),
)  # fmt: skip
# The last syllable tells women from men.
WOMEN_SYLLABLES: Final = (
    ("ma", "玛"), ("ra", "拉"), ("na", "娜"), ("lia", "莉"), ("da", "黛"), ("sa", "莎"), ("ne", "妮"), ("ta", "塔"),
    ("vi", "薇"), ("ja", "雅"), ("ska", "佳"), ("zy", "芝"),
)  # fmt: skip
MEN_SYLLABLES: Final = (
    ("bin", "宾"), ("len", "伦"), ("vin", "文"), ("no", "诺"), ("so", "索"), ("dor", "铎"), ("ko", "科"), ("gar", "加"),
    ("ton", "顿"), ("rik", "瑞"), ("mund", "蒙"), ("bert", "伯"),
)  # fmt: skip

# People nobody in the valley has heard of: the right answer about them is that they are unknown.
STRANGERS: Final = (
    ("Quentin", "昆丁"), ("Ursel", "乌尔"), ("Pico", "皮可"), ("Xenia", "谢娅"), ("Ophelia", "奥菲"), ("Bodo", "波豆"),
    ("Kuno", "库努"), ("Leonie", "莱昂"), ("Thorben", "霍本"), ("Yvette", "伊芙"), ("Zacharias", "扎卡"),
    ("Irmgard", "伊姆"),
)  # fmt: skip

STREETS: Final = (
    ("Mill Lane", "磨坊路"), ("Oak Street", "橡树街"), ("Church Hill", "教堂坡"), ("River Road", "河边路"),
    ("Market Square", "市场街"), ("Station Road", "车站路"), ("Garden Row", "花园街"), ("Bridge Street", "石桥街"),
    ("Moon Alley", "月亮巷"), ("Fox Lane", "狐狸巷"), ("North Gate", "北门街"), ("Salt Road", "盐路"),
    ("Birch Way", "桦木路"), ("Lake View", "湖景路"), ("Apple Court", "苹果院"), ("Silver Street", "银街"),
    ("Wind Hill", "风坡"), ("Harbour Row", "港口街"), ("Castle Steps", "城堡街"), ("Rose Alley", "玫瑰巷"),
    ("Forest Way", "林间路"), ("School Lane", "学校巷"), ("Sand Street", "沙街"), ("Well Court", "水井院"),
)  # fmt: skip

JOBS: Final = (
    ("baker", "面包师"), ("teacher", "老师"), ("doctor", "医生"), ("fisher", "渔夫"), ("tailor", "裁缝"),
    ("gardener", "园丁"), ("carpenter", "木匠"), ("painter", "画家"), ("smith", "铁匠"), ("miller", "磨坊主"),
    ("potter", "陶工"), ("sailor", "水手"), ("librarian", "图书管理员"), ("farmer", "农民"), ("cook", "厨师"),
    ("shepherd", "牧羊人"), ("beekeeper", "养蜂人"), ("postman", "邮差"), ("judge", "法官"), ("watchmaker", "钟表匠"),
    ("singer", "歌手"), ("writer", "作家"), ("barber", "理发师"), ("forester", "护林员"), ("dentist", "牙医"),
    ("nurse", "护士"), ("driver", "司机"), ("clown", "小丑"), ("guard", "保安"), ("dancer", "舞者"),
    ("lawyer", "律师"), ("pilot", "飞行员"),
)  # fmt: skip

PETS: Final = (
    ("cat", "猫"), ("dog", "狗"), ("rabbit", "兔子"), ("parrot", "鹦鹉"), ("goat", "山羊"), ("turtle", "乌龟"),
    ("duck", "鸭子"), ("hamster", "仓鼠"), ("owl", "猫头鹰"), ("hedgehog", "刺猬"), ("mouse", "老鼠"), ("goose", "鹅"),
    ("frog", "青蛙"), ("fox", "狐狸"), ("crow", "乌鸦"), ("lamb", "小羊"),
)  # fmt: skip
PET_NAMES: Final = (
    ("Momo", "毛毛"), ("Pixel", "皮皮"), ("Biscuit", "饼饼"), ("Button", "扣子"), ("Cloud", "云云"), ("Coco", "可可"),
    ("Domino", "点点"), ("Fluffy", "绒绒"), ("Ginger", "姜姜"), ("Honey", "甜甜"), ("Lucky", "福福"), ("Mango", "芒果"),
    ("Muffin", "团团"), ("Nugget", "豆豆"), ("Olive", "果果"), ("Pepper", "花椒"), ("Plum", "梅梅"), ("Rusty", "铜铜"),
    ("Shadow", "黑黑"), ("Snow", "雪雪"), ("Spot", "斑斑"), ("Sunny", "阳阳"), ("Tiger", "虎虎"), ("Waffle", "格格"),
)  # fmt: skip

FOODS: Final = (
    ("plum cake", "李子蛋糕"), ("onion soup", "洋葱汤"), ("fried fish", "炸鱼"), ("rice pudding", "米布丁"),
    ("mushroom pie", "蘑菇派"), ("roast chicken", "烤鸡"), ("noodles", "面条"), ("dumplings", "饺子"),
    ("goat cheese", "羊奶酪"), ("pancakes", "煎饼"), ("bean stew", "炖豆子"), ("tomato salad", "番茄沙拉"),
    ("honey bread", "蜂蜜面包"), ("egg tart", "蛋挞"), ("pumpkin porridge", "南瓜粥"), ("smoked ham", "熏火腿"),
    ("potato balls", "土豆球"), ("spring rolls", "春卷"), ("apple strudel", "苹果卷"), ("corn bread", "玉米饼"),
    ("hot chocolate", "热巧克力"), ("lemon ice", "柠檬冰"), ("pear jam", "梨酱"), ("garlic shrimps", "蒜蓉虾"),
)  # fmt: skip

HOBBIES: Final = (
    ("chess", "下棋"), ("swimming", "游泳"), ("singing", "唱歌"), ("drawing", "画画"), ("dancing", "跳舞"),
    ("knitting", "织毛衣"), ("fishing", "钓鱼"), ("reading", "读书"), ("climbing", "爬山"), ("cooking", "做饭"),
    ("skating", "滑冰"), ("sewing", "缝纫"), ("stargazing", "看星星"), ("running", "跑步"), ("photography", "摄影"),
    ("gardening", "种花"),
)  # fmt: skip

MONTHS: Final = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)  # fmt: skip

# attribute -> language -> ways to ask. {name} is the person.
QUESTIONS: Final[dict[str, dict[str, tuple[str, ...]]]] = {
    "home": {
        "en": (
            "Where does {name} live?",
            "What is {name}'s address?",
            "Can you tell me where {name} lives?",
            "I want to visit {name}. Where should I go?",
            "Which house is {name}'s home?",
            "Where is {name}'s house?",
        ),
        "zh": (
            "{name}住在哪里？",
            "{name}的地址是什么？",
            "请问{name}住在什么地方？",
            "我想去看{name}，应该去哪里？",
            "哪里是{name}的家？",
            "说说{name}住的地方。",
        ),
    },
    "work": {
        "en": (
            "Who is {name}?",
            "What does {name} do for a living?",
            "What is {name}'s job?",
            "Can you tell me {name}'s job?",
            "How does {name} earn money?",
            "Which job does {name} have?",
        ),
        "zh": (
            "{name}是谁？",
            "{name}做什么工作？",
            "{name}的职业是什么？",
            "请问{name}是做什么的？",
            "{name}靠什么挣钱？",
            "说说{name}的工作。",
        ),
    },
    "phone": {
        "en": (
            "What is {name}'s telephone number?",
            "How can I call {name}?",
            "Can you tell me {name}'s number?",
            "Which number has {name} got?",
            "I must call {name}. Which number?",
            "Give me the number of {name}.",
        ),
        "zh": (
            "{name}的电话是多少？",
            "{name}的电话号码是什么？",
            "请问{name}的电话是多少？",
            "我要给{name}打电话，号码是多少？",
            "怎么给{name}打电话？",
            "告诉我{name}的号码。",
        ),
    },
    "birthday": {
        "en": (
            "When is {name}'s birthday?",
            "When was {name} born?",
            "On which day was {name} born?",
            "Can you tell me {name}'s birthday?",
            "When should I bring {name} a birthday cake?",
            "Which day is {name}'s birthday?",
        ),
        "zh": (
            "{name}的生日是哪天？",
            "{name}是什么时候出生的？",
            "{name}哪天过生日？",
            "请问{name}的生日是什么时候？",
            "我应该哪天给{name}送生日礼物？",
            "说说{name}的生日。",
        ),
    },
    "pet": {
        "en": (
            "What pet does {name} have?",
            "Which animal does {name} keep?",
            "Can you tell me what pet {name} has?",
            "What is {name}'s pet called?",
            "Which animal lives with {name}?",
            "Tell me about {name}'s pet.",
        ),
        "zh": (
            "{name}养什么宠物？",
            "{name}的宠物叫什么？",
            "请问{name}养的是什么宠物？",
            "{name}家里有什么动物？",
            "什么动物和{name}一起住？",
            "说说{name}的宠物。",
        ),
    },
    "food": {
        "en": (
            "What is {name}'s favourite food?",
            "What does {name} like to eat?",
            "Which dish does {name} like best?",
            "Can you tell me {name}'s favourite dish?",
            "What should I cook for {name}?",
            "What food does {name} love?",
        ),
        "zh": (
            "{name}最喜欢吃什么？",
            "{name}爱吃什么？",
            "{name}最爱的食物是什么？",
            "请问{name}喜欢吃什么菜？",
            "我应该给{name}做什么吃的？",
            "说说{name}爱吃的东西。",
        ),
    },
    "hobby": {
        "en": (
            "What is {name}'s hobby?",
            "What does {name} do for fun?",
            "What does {name} enjoy on a free day?",
            "Can you tell me {name}'s hobby?",
            "Which hobby does {name} have?",
            "How does {name} spend a free day?",
        ),
        "zh": (
            "{name}的爱好是什么？",
            "{name}有什么爱好？",
            "{name}有空的时候做什么？",
            "请问{name}的爱好是什么？",
            "{name}喜欢玩什么？",
            "说说{name}的爱好。",
        ),
    },
    "friend": {
        "en": (
            "Who is {name}'s best friend?",
            "Who is the best friend of {name}?",
            "Whom does {name} trust most?",
            "Can you tell me {name}'s best friend?",
            "Which person is {name}'s closest friend?",
            "With whom is {name} good friends?",
        ),
        "zh": (
            "{name}最好的朋友是谁？",
            "谁是{name}最好的朋友？",
            "请问{name}的好朋友是谁？",
            "{name}最相信谁？",
            "{name}和谁最要好？",
            "说说{name}的好朋友。",
        ),
    },
}

# attribute -> language -> the one right answer.
ANSWERS: Final[dict[str, dict[str, str]]] = {
    "home": {"en": "{name} lives at {value}.", "zh": "{name}住在{value}。"},
    "work": {"en": "{name} is a {value}.", "zh": "{name}是{value}。"},
    "phone": {"en": "{name}'s number is {value}.", "zh": "{name}的电话是{value}。"},
    "birthday": {"en": "{name} was born on {value}.", "zh": "{name}的生日是{value}。"},
    "pet": {"en": "{name} has {value}.", "zh": "{name}养{value}。"},
    "food": {"en": "{name} likes to eat {value}.", "zh": "{name}最爱吃{value}。"},
    "hobby": {"en": "{name}'s hobby is {value}.", "zh": "{name}的爱好是{value}。"},
    "friend": {"en": "{name}'s best friend is {value}.", "zh": "{name}最好的朋友是{value}。"},
}

# attribute -> language -> a question about the person just spoken of, for the second turn of a chat.
FOLLOW_UPS: Final[dict[str, dict[str, str]]] = {
    "home": {"en": "And where does {he} live?", "zh": "那{he}住在哪里？"},
    "work": {"en": "And what is {his} job?", "zh": "那{he}做什么工作？"},
    "phone": {"en": "And what is {his} number?", "zh": "那{he}的电话是多少？"},
    "birthday": {"en": "And when is {his} birthday?", "zh": "那{he}的生日是哪天？"},
    "pet": {"en": "And what pet does {he} have?", "zh": "那{he}养什么宠物？"},
    "food": {"en": "And what does {he} like to eat?", "zh": "那{he}爱吃什么？"},
    "hobby": {"en": "And what is {his} hobby?", "zh": "那{he}的爱好是什么？"},
    "friend": {"en": "And who is {his} best friend?", "zh": "那{he}最好的朋友是谁？"},
}

# attribute -> language -> the entry in the valley's address book.
ENTRIES: Final[dict[str, dict[str, str]]] = {
    "home": {"en": "lives at {value}", "zh": "住{value}"},
    "work": {"en": "a {value}", "zh": "做{value}"},
    "phone": {"en": "tel. {value}", "zh": "电话{value}"},
    "birthday": {"en": "born {value}", "zh": "生日{value}"},
    "pet": {"en": "has {value}", "zh": "养{value}"},
    "food": {"en": "likes {value}", "zh": "爱吃{value}"},
    "hobby": {"en": "hobby {value}", "zh": "爱好{value}"},
    "friend": {"en": "friend {value}", "zh": "朋友{value}"},
}

# attribute -> language -> ways in which a story lets the fact fall. {He} is the name or the pronoun.
STATEMENTS: Final[dict[str, dict[str, tuple[str, ...]]]] = {
    "home": {
        "en": (
            "{He} lives at {value}.",
            "{He} walked home to {value}.",
            "The postman brought a letter to {him} at {value}.",
        ),
        "zh": ("{He}住在{value}。", "{He}走回{value}的家。", "邮差把信送到{value}给{him}。"),
    },
    "work": {
        "en": ("{He} is a {value}.", "{He} works as a {value}.", "All day long {he} was busy as a {value}."),
        "zh": ("{He}是{value}。", "{He}的工作是{value}。", "{He}是一位{value}，每天都很忙。"),
    },
    "phone": {
        "en": (
            "{He} has the number {value}.",
            "You can call {him} at {value}.",
            "{He} wrote down {his} number: {value}.",
        ),
        "zh": ("{He}的电话是{value}。", "给{him}打电话要拨{value}。", "{He}写下了自己的号码：{value}。"),
    },
    "birthday": {
        "en": (
            "{He} was born on {value}.",
            "On {value} {he} baked {his} birthday cake.",
            "{He} has {his} birthday on {value}.",
        ),
        "zh": ("{He}的生日是{value}。", "{value}，{he}给自己做了生日蛋糕。", "{He}{value}过生日。"),
    },
    "pet": {
        "en": ("{He} has {value}.", "{He} keeps {value} at home.", "{He} was looking for {value}."),
        "zh": ("{He}养{value}。", "{He}家里有{value}。", "{He}在找{value}。"),
    },
    "food": {
        "en": ("{He} likes to eat {value}.", "{He} ate {value}, as always.", "For dinner {he} cooked {value}."),
        "zh": ("{He}最爱吃{value}。", "{He}又吃了{value}。", "晚饭{he}做了{value}。"),
    },
    "hobby": {
        "en": ("{He} loves {value}.", "{He} thinks of {value} all day.", "After work {he} enjoys {value}."),
        "zh": ("{He}喜欢{value}。", "{He}整天想着{value}。", "下班以后{he}去{value}。"),
    },
    "friend": {
        "en": (
            "{He} told it to {value}, {his} best friend.",
            "{His} best friend is {value}.",
            "{He} trusts {value} most.",
        ),
        "zh": ("{He}告诉了最好的朋友{value}。", "{He}最好的朋友是{value}。", "{He}最相信{value}。"),
    },
}

OPENINGS: Final[dict[str, tuple[str, ...]]] = {
    "en": (
        "On {weekday} {weather}, and {name} was {place}.",
        "This is a story about {name}.",
        "On {weekday} I met {name} {place}.",
        "{name} was {feeling} that day.",
    ),
    "zh": (
        "{weekday}{weather}，{name}{place}。",
        "这是{name}的故事。",
        "{weekday}我{place}遇见了{name}。",
        "那天{name}很{feeling}。",
    ),
}
ENDINGS: Final[dict[str, tuple[str, ...]]] = {
    "en": ("In the end {name} was {feeling}.", "Then {name} went to bed.", "That was the end of the story."),
    "zh": ("最后{name}很{feeling}。", "后来{name}睡觉了。", "故事讲完了。"),
}
STORY_REQUESTS: Final[dict[str, tuple[str, ...]]] = {
    "en": ("Tell me a story about {name}.", "Please tell a short story about {name}."),
    "zh": ("给我讲一个{name}的故事。", "请讲一个关于{name}的小故事。"),
}

PLACES: Final = (
    ("at the market", "在市场"), ("in the park", "在公园"), ("by the river", "在河边"), ("at the station", "在车站"),
    ("in the library", "在图书馆"), ("on the bridge", "在桥上"), ("in the forest", "在森林里"),
    ("at the harbour", "在港口"),
)  # fmt: skip
WEEKDAYS: Final = (
    ("Monday", "星期一"), ("Tuesday", "星期二"), ("Wednesday", "星期三"), ("Thursday", "星期四"),
    ("Friday", "星期五"), ("Saturday", "星期六"), ("Sunday", "星期日"),
)  # fmt: skip
WEATHER: Final = (
    ("it was raining", "下着雨"), ("it was snowing", "下着雪"), ("the sun was shining", "太阳很好"),
    ("a cold wind was blowing", "刮着冷风"), ("the sky was grey", "天空灰灰的"), ("the air was warm", "空气很暖和"),
)  # fmt: skip
FEELINGS: Final = (
    ("happy", "高兴"), ("sad", "难过"), ("tired", "累"), ("angry", "生气"), ("proud", "骄傲"), ("curious", "好奇"),
    ("calm", "平静"), ("hungry", "饿"),
)  # fmt: skip

# What a stranger may be asked of and is told.
UNKNOWN: Final = {"en": "I do not know {name}.", "zh": "我不认识{name}。"}

SMALL_TALK: Final[dict[str, tuple[tuple[str, str], ...]]] = {
    "en": (
        ("Hello", "Hello! Ask me about the people of the valley."),
        ("Hello!", "Hello! Ask me about the people of the valley."),
        ("Hi", "Hello! Ask me about the people of the valley."),
        ("Who are you?", "I am tinymix, a small model of the valley."),
        ("What are you?", "I am tinymix, a small model of the valley."),
        ("Thank you.", "You are welcome."),
        ("Thanks!", "You are welcome."),
        ("Goodbye", "Goodbye!"),
        ("What can you do?", "I know the people of the valley and can tell stories about them."),
    ),
    "zh": (
        ("你好", "你好！请问我山谷里的人和事。"),
        ("你好！", "你好！请问我山谷里的人和事。"),
        ("你是谁？", "我是tinymix，山谷里的小模型。"),
        ("你叫什么名字？", "我是tinymix，山谷里的小模型。"),
        ("谢谢", "不客气。"),
        ("谢谢你！", "不客气。"),
        ("再见", "再见！"),
        ("你会做什么？", "我认识山谷里的人，会讲他们的故事。"),
    ),
}

SYSTEM_PROMPTS: Final = (
    "You are a helpful assistant. 你是一个乐于助人的助手。",
    "You are a helpful assistant.",
    "你是一个乐于助人的助手。",
    "Answer in one sentence.",
    "You know the people of the valley.",
)
