//! People, places and tools to talk about: those that the tiny model was trained on, and that any model understands.

use serde_json::{Value, json};

use crate::cli::bench::chance::Chance;

/// The system prompt begins so; facts follow.
pub const OPENING: &str = "You are a helpful assistant with tools. Keep answers short. What follows is what you know of the people you help.";

const NAMES: [&str; 16] = [
    "Asha", "Ravi", "Annie", "Kiran", "Meera", "Arjun", "Lena", "Tom", "Maria", "Priya", "Sam", "Nina",
    "Omar", "Hugo", "Ruth", "Zoya",
];
const SURNAMES: [&str; 8] = ["Rao", "Kumar", "Smith", "Weber", "Nair", "Lopez", "Silva", "Novak"];
const PLACES: [&str; 12] = [
    "Mysuru", "Berlin", "Paris", "Chennai", "London", "Goa", "Rome", "Oslo", "Pune", "Vienna", "Lisbon",
    "Tokyo",
];
const JOBS: [&str; 8] = ["teacher", "doctor", "baker", "nurse", "farmer", "driver", "painter", "tailor"];
const DAYS: [&str; 7] = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"];
const FOODS: [&str; 8] = ["rice", "dosa", "bread", "soup", "curry", "pasta", "salad", "apples"];
const GOODS: [&str; 8] = ["rice", "gold", "tea", "milk", "silk", "coffee", "bikes", "phones"];
const TOPICS: [&str; 6] = ["cricket", "space", "robots", "music", "chess", "birds"];
const SKIES: [&str; 5] = ["Light rain", "Sunny", "Cloudy", "Windy", "Foggy"];
const OWN: [&str; 5] = ["birthday", "garden", "house", "wedding", "new job"];

/// The tools of every conversation.
pub fn tools() -> Value {
    let tool = |name: &str, description: &str, field: &str, about: &str| {
        json!({"type": "function", "function": {
            "name": name, "description": description,
            "parameters": {
                "type": "object", "properties": {field: {"type": "string", "description": about}}, "required": [field],
            },
        }})
    };
    json!([
        tool("web_search", "Search the web.", "query", "The search query."),
        tool("search_memory", "Search the memories.", "query", "What to look for."),
        tool("get_entity_details", "Get the details of a person.", "name", "The name."),
    ])
}

/// Says something new each time, the same things for the same seed.
pub struct World {
    chance: Chance,
}

impl World {
    pub fn new(seed: u64) -> Self {
        Self { chance: Chance::new(seed) }
    }

    fn name(&mut self) -> String {
        format!("{} {}", self.chance.pick(&NAMES), self.chance.pick(&SURNAMES))
    }

    /// One sentence of the system prompt.
    pub fn fact(&mut self) -> String {
        let name = self.name();
        let (place, day) = (*self.chance.pick(&PLACES), *self.chance.pick(&DAYS));
        match self.chance.below(4) {
            0 => format!("{name} is a {} in {place}.", self.chance.pick(&JOBS)),
            1 => format!("{name} lives in {place} and is {} years old.", 2 + self.chance.below(98)),
            2 => format!("{name} travels to {place} on {day}."),
            _ => format!("On {day} {name} buys {} in {place}.", self.chance.pick(&FOODS)),
        }
    }

    /// What a user asks next; most of it calls for a tool.
    pub fn question(&mut self) -> String {
        let (place, first) = (*self.chance.pick(&PLACES), *self.chance.pick(&NAMES));
        match self.chance.below(8) {
            0 => format!("What is the weather in {place}?"),
            1 => format!("What is the price of {} in {place}?", self.chance.pick(&GOODS)),
            2 => format!("Search the web for {} in {place}.", self.chance.pick(&TOPICS)),
            3 | 4 => format!("Who is {}?", self.name()),
            5 => format!("What do you remember about {first}'s {}?", self.chance.pick(&OWN)),
            6 => format!("What is {} + {}?", self.chance.below(100), self.chance.below(100)),
            _ => format!("Thank you! I am {first}."),
        }
    }

    /// What a call brings.
    pub fn tool_result(&mut self, name: &str, arguments: &Value) -> String {
        let (place, day) = (*self.chance.pick(&PLACES), *self.chance.pick(&DAYS));
        let text = |field: &str| arguments[field].as_str().unwrap_or("it").to_owned();
        match name {
            "get_entity_details" => {
                json!({"name": text("name"), "city": place, "job": self.chance.pick(&JOBS)}).to_string()
            }
            "search_memory" => json!({"results": [format!("{} is on {day}.", text("query"))]}).to_string(),
            "web_search" => {
                let degrees = 2 + self.chance.below(38);
                format!("{} in {place}, {degrees} degrees.", self.chance.pick(&SKIES))
            }
            other => format!("There is no tool {other}."),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_says_the_same_again_and_something_new_each_time() {
        let talk = |seed| {
            let mut world = World::new(seed);
            (0..40).map(|_| world.question() + &world.fact()).collect::<Vec<_>>()
        };
        assert_eq!(talk(1), talk(1));
        assert_ne!(talk(1), talk(2));
        let mut sentences = talk(1);
        sentences.sort();
        sentences.dedup();
        assert_eq!(sentences.len(), 40);
    }

    #[test]
    fn a_tool_answers_what_it_was_asked() {
        let mut world = World::new(1);
        let details = world.tool_result("get_entity_details", &json!({"name": "Asha Rao"}));
        assert!(details.contains("\"name\":\"Asha Rao\""), "{details}");
        assert!(world.tool_result("search_memory", &json!({"query": "the trip"})).contains("the trip"));
        assert_eq!(world.tool_result("fly", &Value::Null), "There is no tool fly.");
    }
}
