"""Words and sentence patterns of the valley, the small world that tinymix is taught.

Data only: `world.py` draws from it. Every row carries English and Chinese side by side, so that both
languages tell of the same people, places and things. A pattern's `{slots}` are filled by `world.py`.
"""

from typing import Final

# (English name, Chinese name, is a woman)
PEOPLE: Final = (
    ("Mira", "米拉", True), ("Tobin", "托宾", False), ("Anka", "安卡", True), ("Oren", "奥伦", False),
    ("Selma", "西玛", True), ("Davin", "达文", False), ("Lotta", "洛塔", True), ("Bruno", "布诺", False),
    ("Nell", "尼丽", True), ("Kasper", "卡森", False), ("Vera", "维拉", True), ("Joss", "乔西", False),
    ("Tilda", "提达", True), ("Rowan", "罗万", False), ("Inga", "英加", True), ("Felix", "菲里", False),
    ("Petra", "贝塔", True), ("Hugo", "胡戈", False), ("Sanna", "桑娜", True), ("Matteo", "马泰", False),
    ("Dora", "朵拉", True), ("Egon", "艾贡", False), ("Klara", "可兰", True), ("Linus", "林努", False),
    ("Yara", "雅兰", True), ("Arlo", "阿洛", False), ("Greta", "格雷", True), ("Cedric", "赛德", False),
    ("Nadia", "娜雅", True), ("Otto", "欧图", False), ("Paula", "宝拉", True), ("Ivo", "伊沃", False),
    ("Ronja", "荣亚", True), ("Silas", "赛拉", False), ("Wilma", "薇玛", True), ("Basil", "巴西", False),
    ("Elin", "爱琳", True), ("Jasper", "杰森", False), ("Freya", "芙蕾", True), ("Magnus", "马努", False),
    ("Tessa", "泰莎", True), ("Ruben", "鲁本", False), ("Alma", "阿玛", True), ("Viktor", "维克", False),
    ("Hedda", "海达", True), ("Emil", "艾米", False), ("Bianca", "白卡", True), ("Lukas", "卢卡", False),
)  # fmt: skip

# People nobody in the valley has heard of: the right answer about them is that they are unknown.
STRANGERS: Final = (
    ("Zora", "佐拉"), ("Quentin", "昆丁"), ("Ursel", "乌塞"), ("Pico", "皮科"), ("Xenia", "谢尼"),
    ("Gustav", "古斯"), ("Ophelia", "奥菲"), ("Bodo", "波多"), ("Irma", "伊玛"), ("Kuno", "库诺"),
    ("Leonie", "莱尼"), ("Norbert", "诺贝"), ("Rosalind", "罗莎"), ("Thorben", "托本"), ("Yvette", "伊维"),
    ("Walter", "瓦特"),
)  # fmt: skip

# attribute -> (English value, Chinese value)
VALUES: Final[dict[str, tuple[tuple[str, str], ...]]] = {
    "home": (
        ("Oakport", "橡港"), ("Redhill", "红山"), ("Stonebridge", "石桥"), ("Millbrook", "磨溪"),
        ("Foxdale", "狐谷"), ("Windmoor", "风原"), ("Saltbay", "盐湾"), ("Birchfield", "桦田"),
        ("Lakeside", "湖边镇"), ("Northgate", "北门"), ("Greenwood", "青林"), ("Silverford", "银滩"),
        ("Cloudtop", "云顶"), ("Applebury", "苹果村"), ("Sandholm", "沙岛"), ("Moonwell", "月井"),
    ),
    "work": (
        ("baker", "面包师"), ("teacher", "老师"), ("doctor", "医生"), ("fisher", "渔夫"), ("tailor", "裁缝"),
        ("gardener", "园丁"), ("carpenter", "木匠"), ("painter", "画家"), ("smith", "铁匠"), ("miller", "磨坊主"),
        ("potter", "陶工"), ("sailor", "水手"), ("librarian", "图书管理员"), ("farmer", "农民"), ("cook", "厨师"),
        ("shepherd", "牧羊人"), ("beekeeper", "养蜂人"), ("postman", "邮差"), ("judge", "法官"),
        ("watchmaker", "钟表匠"), ("singer", "歌手"), ("writer", "作家"), ("barber", "理发师"),
        ("forester", "护林员"),
    ),
    "pet": (
        ("cat", "猫"), ("dog", "狗"), ("rabbit", "兔子"), ("parrot", "鹦鹉"), ("goat", "山羊"), ("turtle", "乌龟"),
        ("duck", "鸭子"), ("pony", "小马"), ("owl", "猫头鹰"), ("hedgehog", "刺猬"), ("mouse", "老鼠"),
        ("goose", "鹅"), ("frog", "青蛙"), ("fox", "狐狸"), ("crow", "乌鸦"), ("lamb", "小羊"),
    ),
    "food": (
        ("plum cake", "李子蛋糕"), ("onion soup", "洋葱汤"), ("fried fish", "炸鱼"), ("rice pudding", "米布丁"),
        ("mushroom pie", "蘑菇派"), ("roast chicken", "烤鸡"), ("noodles", "面条"), ("dumplings", "饺子"),
        ("goat cheese", "羊奶酪"), ("pancakes", "煎饼"), ("bean stew", "炖豆子"), ("tomato salad", "番茄沙拉"),
        ("honey bread", "蜂蜜面包"), ("egg tart", "蛋挞"), ("pumpkin porridge", "南瓜粥"), ("smoked ham", "熏火腿"),
        ("potato balls", "土豆球"), ("spring rolls", "春卷"), ("apple strudel", "苹果卷"), ("corn bread", "玉米饼"),
    ),
    "drink": (
        ("green tea", "绿茶"), ("black coffee", "黑咖啡"), ("apple juice", "苹果汁"), ("warm milk", "热牛奶"),
        ("lemon water", "柠檬水"), ("hot chocolate", "热巧克力"), ("pear cider", "梨酒"), ("mint tea", "薄荷茶"),
        ("soy milk", "豆浆"), ("red wine", "红酒"), ("ginger beer", "姜汁汽水"), ("plum juice", "酸梅汤"),
    ),
    "colour": (
        ("red", "红色"), ("blue", "蓝色"), ("green", "绿色"), ("yellow", "黄色"), ("white", "白色"),
        ("black", "黑色"), ("purple", "紫色"), ("orange", "橙色"), ("brown", "棕色"), ("grey", "灰色"),
        ("pink", "粉色"), ("golden", "金色"),
    ),
    "hobby": (
        ("chess", "下棋"), ("swimming", "游泳"), ("singing", "唱歌"), ("drawing", "画画"), ("dancing", "跳舞"),
        ("knitting", "织毛衣"), ("fishing", "钓鱼"), ("reading", "读书"), ("climbing", "爬山"), ("cooking", "做饭"),
        ("skating", "滑冰"), ("sewing", "缝纫"), ("stargazing", "看星星"), ("running", "跑步"),
        ("photography", "摄影"), ("gardening", "种花"),
    ),
    "month": (
        ("January", "一月"), ("February", "二月"), ("March", "三月"), ("April", "四月"), ("May", "五月"),
        ("June", "六月"), ("July", "七月"), ("August", "八月"), ("September", "九月"), ("October", "十月"),
        ("November", "十一月"), ("December", "十二月"),
    ),
    "vehicle": (
        ("bicycle", "骑自行车"), ("train", "坐火车"), ("boat", "划小船"), ("bus", "坐公共汽车"), ("tram", "坐电车"),
        ("cart", "赶马车"), ("motorcycle", "骑摩托车"), ("ferry", "坐渡轮"), ("sledge", "坐雪橇"), ("van", "开货车"),
    ),
}  # fmt: skip

# attribute -> language -> ways to ask. {name} is the person, {his} the possessive pronoun in a follow-up.
QUESTIONS: Final[dict[str, dict[str, tuple[str, ...]]]] = {
    "home": {
        "en": (
            "Where does {name} live?",
            "In which town does {name} live?",
            "What town is {name}'s home?",
            "Can you tell me where {name} lives?",
            "Which town does {name} call home?",
            "I want to visit {name}. Which town should I go to?",
            "Name the home town of {name}.",
            "Where is {name}'s house?",
        ),
        "zh": (
            "{name}住在哪里？",
            "{name}的家在哪里？",
            "{name}住在哪个镇上？",
            "请问{name}住在什么地方？",
            "你知道{name}住在哪儿吗？",
            "我想去看{name}，应该去哪里？",
            "哪里是{name}的家？",
            "说说{name}住的地方。",
        ),
    },
    "work": {
        "en": (
            "What does {name} do for a living?",
            "What is {name}'s job?",
            "What work does {name} do?",
            "Can you tell me {name}'s job?",
            "What is the trade of {name}?",
            "How does {name} earn money?",
            "Name the job of {name}.",
            "Which job does {name} have?",
        ),
        "zh": (
            "{name}做什么工作？",
            "{name}的工作是什么？",
            "{name}的职业是什么？",
            "请问{name}是做什么的？",
            "你知道{name}的工作吗？",
            "{name}靠什么挣钱？",
            "{name}有什么样的工作？",
            "说说{name}的职业。",
        ),
    },
    "pet": {
        "en": (
            "What pet does {name} have?",
            "Which animal does {name} keep?",
            "What kind of pet lives with {name}?",
            "Can you tell me what pet {name} has?",
            "What is {name}'s pet?",
            "Name the pet of {name}.",
            "Which animal belongs to {name}?",
            "What animal does {name} keep at home?",
        ),
        "zh": (
            "{name}养什么宠物？",
            "{name}的宠物是什么？",
            "{name}养了什么动物？",
            "请问{name}养的是什么宠物？",
            "你知道{name}养什么吗？",
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
            "Name the favourite food of {name}.",
            "What does {name} like to eat most?",
        ),
        "zh": (
            "{name}最喜欢吃什么？",
            "{name}爱吃什么？",
            "{name}最爱的食物是什么？",
            "请问{name}喜欢吃什么菜？",
            "你知道{name}最爱吃什么吗？",
            "我应该给{name}做什么吃的？",
            "什么是{name}最喜欢的食物？",
            "说说{name}爱吃的东西。",
        ),
    },
    "drink": {
        "en": (
            "What is {name}'s favourite drink?",
            "What does {name} like to drink?",
            "Which drink does {name} like best?",
            "Can you tell me {name}'s favourite drink?",
            "What should I pour for {name}?",
            "What drink does {name} love?",
            "Name the favourite drink of {name}.",
            "What does {name} drink most?",
        ),
        "zh": (
            "{name}最喜欢喝什么？",
            "{name}爱喝什么？",
            "{name}最爱的饮料是什么？",
            "请问{name}喜欢喝什么？",
            "你知道{name}最爱喝什么吗？",
            "我应该给{name}倒什么喝的？",
            "什么是{name}最喜欢的饮料？",
            "说说{name}爱喝的东西。",
        ),
    },
    "colour": {
        "en": (
            "What is {name}'s favourite colour?",
            "Which colour does {name} like best?",
            "What colour does {name} love?",
            "Can you tell me {name}'s favourite colour?",
            "In which colour should I paint {name}'s door?",
            "Name the favourite colour of {name}.",
            "Which colour does {name} like most?",
            "What colour does {name} wear?",
        ),
        "zh": (
            "{name}最喜欢什么颜色？",
            "{name}爱什么颜色？",
            "{name}最爱的颜色是什么？",
            "请问{name}喜欢哪种颜色？",
            "你知道{name}最喜欢的颜色吗？",
            "{name}的门应该用什么颜色？",
            "什么是{name}最喜欢的颜色？",
            "说说{name}喜欢的颜色。",
        ),
    },
    "hobby": {
        "en": (
            "What is {name}'s hobby?",
            "What does {name} do for fun?",
            "What does {name} do in free hours?",
            "Can you tell me {name}'s hobby?",
            "Which hobby does {name} have?",
            "Name the hobby of {name}.",
            "What does {name} enjoy on a free day?",
            "How does {name} spend a free day?",
        ),
        "zh": (
            "{name}的爱好是什么？",
            "{name}有什么爱好？",
            "{name}有空的时候做什么？",
            "请问{name}的爱好是什么？",
            "你知道{name}的爱好吗？",
            "{name}喜欢玩什么？",
            "什么是{name}的爱好？",
            "说说{name}的爱好。",
        ),
    },
    "month": {
        "en": (
            "When was {name} born?",
            "In which month was {name} born?",
            "What month is {name}'s birthday in?",
            "Can you tell me {name}'s birth month?",
            "When is {name}'s birthday?",
            "Name the birth month of {name}.",
            "Which month holds {name}'s birthday?",
            "When should I bring {name} a birthday cake?",
        ),
        "zh": (
            "{name}是几月出生的？",
            "{name}的生日在几月？",
            "{name}哪个月过生日？",
            "请问{name}是什么时候出生的？",
            "你知道{name}的生日吗？",
            "我应该几月给{name}送生日礼物？",
            "哪个月有{name}的生日？",
            "说说{name}的生日。",
        ),
    },
    "vehicle": {
        "en": (
            "How does {name} travel?",
            "How does {name} go to work?",
            "What does {name} ride to work?",
            "Can you tell me how {name} travels?",
            "Which vehicle does {name} take?",
            "Name the vehicle of {name}.",
            "In what way does {name} get to work?",
            "What does {name} take to travel?",
        ),
        "zh": (
            "{name}怎么出门？",
            "{name}平时怎么走？",
            "{name}用什么交通工具？",
            "请问{name}怎么去上班？",
            "你知道{name}怎么出门吗？",
            "{name}出门的时候用什么？",
            "{name}每天用什么出门？",
            "说说{name}怎么出门。",
        ),
    },
    "friend": {
        "en": (
            "Who is {name}'s best friend?",
            "Who is the best friend of {name}?",
            "Whom does {name} trust most?",
            "Can you tell me {name}'s best friend?",
            "Which person is {name}'s closest friend?",
            "Name the best friend of {name}.",
            "Who is {name}'s friend?",
            "With whom is {name} good friends?",
        ),
        "zh": (
            "{name}最好的朋友是谁？",
            "谁是{name}最好的朋友？",
            "{name}的好朋友叫什么？",
            "请问{name}的好朋友是谁？",
            "你知道{name}的好朋友是谁吗？",
            "{name}最相信谁？",
            "{name}和谁最要好？",
            "说说{name}的好朋友。",
        ),
    },
}

# attribute -> language -> the one right answer.
ANSWERS: Final[dict[str, dict[str, str]]] = {
    "home": {"en": "{name} lives in {value}.", "zh": "{name}住在{value}。"},
    "work": {"en": "{name} is {a_value}.", "zh": "{name}是{value}。"},
    "pet": {"en": "{name} has {a_value}.", "zh": "{name}养{value}。"},
    "food": {"en": "{name} likes to eat {value}.", "zh": "{name}最爱吃{value}。"},
    "drink": {"en": "{name} likes to drink {value}.", "zh": "{name}最爱喝{value}。"},
    "colour": {"en": "{name}'s favourite colour is {value}.", "zh": "{name}最喜欢{value}。"},
    "hobby": {"en": "{name}'s hobby is {value}.", "zh": "{name}的爱好是{value}。"},
    "month": {"en": "{name} was born in {value}.", "zh": "{name}的生日在{value}。"},
    "vehicle": {"en": "{name} travels by {value}.", "zh": "{name}{value}出门。"},
    "friend": {"en": "{name}'s best friend is {value}.", "zh": "{name}最好的朋友是{value}。"},
}

# attribute -> language -> a question about the person just spoken of, for the second turn of a chat.
FOLLOW_UPS: Final[dict[str, dict[str, str]]] = {
    "home": {"en": "And where does {he} live?", "zh": "那{he}住在哪里？"},
    "work": {"en": "And what is {his} job?", "zh": "那{he}做什么工作？"},
    "pet": {"en": "And what pet does {he} have?", "zh": "那{he}养什么宠物？"},
    "food": {"en": "And what does {he} like to eat?", "zh": "那{he}爱吃什么？"},
    "drink": {"en": "And what does {he} like to drink?", "zh": "那{he}爱喝什么？"},
    "colour": {"en": "And what is {his} favourite colour?", "zh": "那{he}喜欢什么颜色？"},
    "hobby": {"en": "And what is {his} hobby?", "zh": "那{he}的爱好是什么？"},
    "month": {"en": "And when was {he} born?", "zh": "那{he}的生日在几月？"},
    "vehicle": {"en": "And how does {he} travel?", "zh": "那{he}怎么出门？"},
    "friend": {"en": "And who is {his} best friend?", "zh": "那{he}最好的朋友是谁？"},
}

# attribute -> language -> ways in which a story lets the fact fall.
STATEMENTS: Final[dict[str, dict[str, tuple[str, ...]]]] = {
    "home": {
        "en": (
            "{name} lives in {value}.",
            "Back home in {value}, {name} lit the lamp.",
            "{name} walked home to {value}.",
            "{value} is the town where {name} lives.",
        ),
        "zh": ("{name}住在{value}。", "{name}走回{value}的家。", "{name}的家在{value}。", "{value}是{name}住的地方。"),
    },
    "work": {
        "en": (
            "{name} is a {value}.",
            "{name} works as a {value}.",
            "Everyone knows {name} the {value}.",
            "A {value} like {name} is never idle.",
        ),
        "zh": (
            "{name}是{value}。",
            "{name}的工作是{value}。",
            "大家都认识{value}{name}。",
            "{name}是一位{value}，每天都很忙。",
        ),
    },
    "pet": {
        "en": (
            "{name} has {a_value}.",
            "{name}'s {value} was waiting at the door.",
            "The {value} of {name} was hungry.",
            "{name} keeps {a_value} at home.",
        ),
        "zh": ("{name}养{value}。", "{name}的{value}在门口等着。", "{name}的{value}饿了。", "{name}家里养着{value}。"),
    },
    "food": {
        "en": (
            "{name} likes to eat {value}.",
            "{name} ate {value}, as always.",
            "Nothing tastes better to {name} than {value}.",
            "{name} cooked {value}, {his} favourite food.",
        ),
        "zh": (
            "{name}最爱吃{value}。",
            "{name}又吃了{value}。",
            "对{name}来说，{value}最好吃。",
            "{name}做了最爱的{value}。",
        ),
    },
    "drink": {
        "en": (
            "{name} likes to drink {value}.",
            "{name} asked for a cup of {value}.",
            "{name} drank {value}, as always.",
            "A cup of {value} makes {name} happy.",
        ),
        "zh": (
            "{name}最爱喝{value}。",
            "{name}要了一杯{value}。",
            "{name}又喝了{value}。",
            "一杯{value}让{name}很高兴。",
        ),
    },
    "colour": {
        "en": (
            "{name}'s favourite colour is {value}.",
            "{name} put on a {value} coat.",
            "{name} painted the door {value}.",
            "{name} likes {value} things.",
        ),
        "zh": (
            "{name}最喜欢{value}。",
            "{name}穿上{value}的外衣。",
            "{name}把门画成{value}。",
            "{name}喜欢{value}的东西。",
        ),
    },
    "hobby": {
        "en": (
            "{name}'s hobby is {value}.",
            "{name} thinks of {value} all day.",
            "On free days {name} enjoys {value}.",
            "For {name} nothing beats {value}.",
        ),
        "zh": (
            "{name}的爱好是{value}。",
            "{name}整天想着{value}。",
            "有空的时候，{name}就去{value}。",
            "{name}喜欢{value}。",
        ),
    },
    "month": {
        "en": (
            "{name} was born in {value}.",
            "{name}'s birthday is in {value}.",
            "Every {value} {name} has a birthday cake.",
            "{name} likes {value}, the month of {his} birthday.",
        ),
        "zh": (
            "{name}的生日在{value}。",
            "{name}是{value}出生的。",
            "每年{value}，{name}都过生日。",
            "{name}在{value}过生日。",
        ),
    },
    "vehicle": {
        "en": (
            "{name} travels by {value}.",
            "{name} goes to work by {value}.",
            "{name} took the {value}, as always.",
            "{name} never travels without the {value}.",
        ),
        "zh": ("{name}{value}出门。", "{name}{value}去上班。", "{name}又{value}走了。", "{name}每天都{value}。"),
    },
    "friend": {
        "en": (
            "{name}'s best friend is {value}.",
            "{name} told {value}, {his} best friend, all about it.",
            "{name} trusts {value} most of all.",
            "{name} and {his} best friend {value} laughed.",
        ),
        "zh": (
            "{name}最好的朋友是{value}。",
            "{name}把事情都告诉了好朋友{value}。",
            "{name}最相信{value}。",
            "{name}和好朋友{value}都笑了。",
        ),
    },
}

# (English singular, its plural, Chinese, Chinese measure word)
THINGS: Final = (
    ("lamp", "lamps", "灯", "盏"), ("key", "keys", "钥匙", "把"), ("book", "books", "书", "本"),
    ("map", "maps", "地图", "张"), ("letter", "letters", "信", "封"), ("ring", "rings", "戒指", "个"),
    ("bell", "bells", "铃", "个"), ("hat", "hats", "帽子", "顶"), ("coin", "coins", "硬币", "个"),
    ("basket", "baskets", "篮子", "个"), ("mirror", "mirrors", "镜子", "面"), ("chair", "chairs", "椅子", "把"),
    ("table", "tables", "桌子", "张"), ("bottle", "bottles", "瓶子", "个"), ("box", "boxes", "盒子", "个"),
    ("clock", "clocks", "钟", "个"), ("drum", "drums", "鼓", "面"), ("flute", "flutes", "笛子", "支"),
    ("kite", "kites", "风筝", "个"), ("ladder", "ladders", "梯子", "架"), ("rope", "ropes", "绳子", "条"),
    ("shoe", "shoes", "鞋", "只"), ("spoon", "spoons", "勺子", "把"), ("pot", "pots", "锅", "口"),
    ("blanket", "blankets", "毯子", "条"), ("candle", "candles", "蜡烛", "支"), ("umbrella", "umbrellas", "雨伞", "把"),
    ("photo", "photos", "照片", "张"), ("stone", "stones", "石头", "块"), ("feather", "feathers", "羽毛", "根"),
    ("shell", "shells", "贝壳", "个"), ("apple", "apples", "苹果", "个"), ("pear", "pears", "梨", "个"),
    ("egg", "eggs", "鸡蛋", "个"), ("flower", "flowers", "花", "朵"), ("nail", "nails", "钉子", "颗"),
    ("hammer", "hammers", "锤子", "把"), ("needle", "needles", "针", "根"), ("brush", "brushes", "刷子", "把"),
    ("wheel", "wheels", "轮子", "个"), ("bag", "bags", "袋子", "个"), ("button", "buttons", "纽扣", "颗"),
    ("glove", "gloves", "手套", "只"), ("barrel", "barrels", "桶", "个"), ("pillow", "pillows", "枕头", "个"),
    ("plate", "plates", "盘子", "个"), ("ticket", "tickets", "票", "张"), ("violin", "violins", "小提琴", "把"),
)  # fmt: skip

ADJECTIVES: Final = (
    ("old", "旧的"), ("new", "新的"), ("small", "小小的"), ("big", "大大的"), ("broken", "破的"),
    ("shiny", "发亮的"), ("heavy", "很重的"), ("light", "很轻的"), ("wooden", "木头的"), ("glass", "玻璃的"),
    ("copper", "铜的"), ("silver", "银的"), ("dusty", "满是灰的"), ("wet", "湿的"), ("warm", "温暖的"),
    ("strange", "奇怪的"), ("pretty", "漂亮的"), ("round", "圆圆的"), ("long", "长长的"), ("cheap", "便宜的"),
    ("soft", "软软的"), ("empty", "空的"), ("lost", "丢失的"), ("clean", "干净的"), ("secret", "秘密的"),
    ("foreign", "外国的"), ("tiny", "很小的"), ("painted", "画着花的"),
)  # fmt: skip

PLACES: Final = (
    ("at the market", "在市场"), ("in the park", "在公园"), ("by the river", "在河边"), ("at the station", "在车站"),
    ("in the library", "在图书馆"), ("on the bridge", "在桥上"), ("in the forest", "在森林里"),
    ("on the beach", "在海滩上"), ("in the kitchen", "在厨房"), ("behind the church", "在教堂后面"),
    ("in the garden", "在花园里"), ("at the harbour", "在港口"), ("in the school", "在学校"),
    ("on the hill", "在山上"), ("in the cellar", "在地下室"), ("under a tree", "在树下"), ("in the barn", "在谷仓"),
    ("near the well", "在井边"), ("in the tea house", "在茶馆"), ("at the mill", "在磨坊"), ("in the tower", "在塔里"),
    ("on the roof", "在屋顶上"), ("at the town hall", "在镇政府"), ("in the bookshop", "在书店"),
)  # fmt: skip

TIMES: Final = (
    ("On {weekday} morning", "{weekday}早上"),
    ("On {weekday} evening", "{weekday}晚上"),
    ("At {hour} o'clock", "{hour}点钟"),
    ("One winter night", "冬天的一个晚上"),
    ("One summer day", "夏天的一天"),
    ("Early in {month}", "{month}初"),
    ("Late in {month}", "{month}底"),
    ("After lunch", "午饭以后"),
    ("Before sunrise", "日出以前"),
    ("{small} days later", "{small}天以后"),
    ("On the {day} of {month}", "{month}{day_zh}日"),
    ("At noon", "中午"),
    ("In the spring of {year}", "{year}年春天"),
    ("In the autumn of {year}", "{year}年秋天"),
)

WEEKDAYS: Final = (
    ("Monday", "星期一"), ("Tuesday", "星期二"), ("Wednesday", "星期三"), ("Thursday", "星期四"),
    ("Friday", "星期五"), ("Saturday", "星期六"), ("Sunday", "星期日"),
)  # fmt: skip

WEATHER: Final = (
    ("it was raining", "下着雨"),
    ("it was snowing", "下着雪"),
    ("the sun was shining", "太阳很好"),
    ("a cold wind was blowing", "刮着冷风"),
    ("fog lay over the fields", "田野上有雾"),
    ("the sky was grey", "天空灰灰的"),
    ("the moon was full", "月亮很圆"),
    ("the air was warm", "空气很暖和"),
    ("thunder rolled far away", "远处打着雷"),
    ("the streets were icy", "路上结了冰"),
    ("leaves were falling", "树叶落下来"),
    ("the snow was melting", "雪正在化"),
)

FEELINGS: Final = (
    ("happy", "高兴"), ("sad", "难过"), ("tired", "累"), ("angry", "生气"), ("proud", "骄傲"), ("curious", "好奇"),
    ("afraid", "害怕"), ("calm", "平静"), ("hungry", "饿"), ("surprised", "惊讶"), ("lonely", "孤单"), ("sleepy", "困"),
)  # fmt: skip

OPENINGS: Final[dict[str, tuple[str, ...]]] = {
    "en": (
        "{time} {weather}, and {name} was {place}.",
        "{time} {name} met {person} {place}.",
        "{time} {name} left {town} with {thing}.",
        "This is a story about {name} and {thing}.",
        "{name} woke up {feeling} because {weather}.",
        "{person} once told me about {name}.",
        "{time} a letter from {person} reached {name}.",
        "Nobody in {town} knew why {name} was so {feeling}.",
    ),
    "zh": (
        "{time}，{weather}，{name}{place}。",
        "{time}，{name}{place}遇见了{person}。",
        "{time}，{name}带着{thing}离开{town}。",
        "这是{name}和{thing}的故事。",
        "{name}醒来的时候很{feeling}，因为{weather}。",
        "{person}给我讲过{name}的事。",
        "{time}，{name}收到了{person}的信。",
        "{town}没有人知道{name}为什么这么{feeling}。",
    ),
}

EVENTS: Final[dict[str, tuple[str, ...]]] = {
    "en": (
        "{He} found {thing} {place}.",
        "{person} gave {him} {thing}.",
        "{He} bought {number} {plural} for {price} coins.",
        "{He} sold {thing} to {person} for {price} coins.",
        "{place_cap}, {he} saw {person} with {thing}.",
        "{time} {weather}.",
        "{He} was {feeling}, but {person} was {feeling2}.",
        '"Have you seen my {noun}?" asked {person}.',
        '"I need {number} {plural}," said {name}.',
        "{person} and {person2} were looking for {thing}.",
        "{He} carried {thing} to {town}.",
        "{He} waited {number} minutes {place}.",
        "Then {he} forgot {thing} {place}.",
        "{time} {person} came back from {town}.",
        "{person} had lost {number} {plural} {place}.",
        "{He} counted the {plural}: there were {number}.",
        "{person} wanted {food} and a cup of {drink}.",
        "A {colour} {animal} ran away with the {noun}.",
        "{He} hid {thing} and {thing2} {place}.",
        "The road to {town} was {number} miles long, and {weather}.",
        "{person} wrote a long letter about the {noun}.",
        "{He} mended {thing} with {thing2}.",
        '"{time}," said {person}, "I was {place}."',
        "{person} laughed, because the {noun} was {colour}.",
        "{He} dreamed of {thing} and of {food}.",
        "{person} asked for {number} coins, but {name} had only {small}.",
        "{time} they all met {place}.",
        "{He} opened the {noun} and saw {thing}.",
        "{person} sang while {weather}.",
        "{He} traded {thing} for {thing2}.",
        "An {old} {animal} slept {place}.",
        "{person2} said that {person} was {feeling}.",
    ),
    "zh": (
        "{He}{place}找到了{thing}。",
        "{person}给了{him}{thing}。",
        "{He}花{price}元买了{number}{measure}{noun}。",
        "{He}把{thing}卖给{person}，得到{price}元。",
        "{He}{place}看见{person}拿着{thing}。",
        "{time}，{weather}。",
        "{He}很{feeling}，可是{person}很{feeling2}。",
        "“你看见我的{noun}了吗？”{person}问。",
        "“我要{number}{measure}{noun}。”{name}说。",
        "{person}和{person2}在找{thing}。",
        "{He}把{thing}送到{town}。",
        "{He}{place}等了{number}分钟。",
        "后来{he}{place}忘了{thing}。",
        "{time}，{person}从{town}回来了。",
        "{person}{place}丢了{number}{measure}{noun}。",
        "{He}数了数{noun}，一共{number}{measure}。",
        "{person}想要{food}和一杯{drink}。",
        "一只{colour}的{animal}拿走了{noun}。",
        "{He}{place}藏了{thing}和{thing2}。",
        "去{town}的路有{number}里，{weather}。",
        "{person}写了一封长信，说的是{noun}。",
        "{He}用{thing}修好了{thing2}。",
        "“{time}，我{place}。”{person}说。",
        "{person}笑了，因为{noun}是{colour}的。",
        "{He}梦见了{thing}和{food}。",
        "{person}要{number}元，可是{name}只有{small}元。",
        "{time}，大家{place}见面。",
        "{He}打开{noun}，看见{thing}。",
        "{person}唱着歌，{weather}。",
        "{He}用{thing}换了{thing2}。",
        "一只老{animal}{place}睡着了。",
        "{person2}说{person}很{feeling}。",
    ),
}

ENDINGS: Final[dict[str, tuple[str, ...]]] = {
    "en": (
        "In the end {name} was {feeling}.",
        "From that day {name} never lost {thing} again.",
        "And so {name} and {person} became friends.",
        "{name} went to bed at {hour} o'clock.",
        "The {noun} is still {place}.",
        "That was the end of the story.",
    ),
    "zh": (
        "最后{name}很{feeling}。",
        "从那天起，{name}再也没有丢过{thing}。",
        "就这样，{name}和{person}成了朋友。",
        "{name}{hour}点钟睡觉了。",
        "{noun}现在还{place}。",
        "故事讲完了。",
    ),
}

STORY_REQUESTS: Final[dict[str, tuple[str, ...]]] = {
    "en": ("Tell me a story about {name}.", "Please tell a short story about {name}.", "What happened to {name}?"),
    "zh": ("给我讲一个{name}的故事。", "请讲一个关于{name}的小故事。", "{name}遇到了什么事？"),
}

# Language -> (what a passage tells, the question about it, its answer): answered from the prompt, not from memory.
READING: Final[dict[str, tuple[tuple[str, str, str], ...]]] = {
    "en": (
        ("{name} found {thing} {place}.", "What did {name} find?", "{name} found {thing}."),
        ("{name} bought {number} {plural}.", "What did {name} buy?", "{name} bought {number} {plural}."),
        ("{name} lost {thing} {place}.", "What did {name} lose?", "{name} lost {thing}."),
        ("{name} met {person} {place}.", "Whom did {name} meet?", "{name} met {person}."),
        ("{name} went to {town}.", "Where did {name} go?", "{name} went to {town}."),
    ),
    "zh": (
        ("{name}{place}找到了{thing}。", "{name}找到了什么？", "{name}找到了{thing}。"),
        ("{name}买了{number}{measure}{noun}。", "{name}买了什么？", "{name}买了{number}{measure}{noun}。"),
        ("{name}{place}丢了{thing}。", "{name}丢了什么？", "{name}丢了{thing}。"),
        ("{name}{place}遇见了{person}。", "{name}遇见了谁？", "{name}遇见了{person}。"),
        ("{name}去了{town}。", "{name}去了哪里？", "{name}去了{town}。"),
    ),
}

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
