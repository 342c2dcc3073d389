//! Models that come and go, and sleep: `/models`, `/models/load`, `/models/unload`, `/sleep`, `/wake_up`.

use super::models::continued;
use super::world::{CONTEXT, Server, VOCAB, forgetful, opening, post, read, scripted, text};
use axum::body::{Body, HttpBody};
use axum::http::{StatusCode, header};
use axum::response::Response;
use ferrotron::api::{
    App, Estimate, Facts, Keeping, Known, LoadError, Loader, ModelInfo, Options, Resident, SamplingDefaults,
    Simulation, Target,
};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

const COMPLETIONS: &str = "/v1/completions";
/// Nobody waits so long when all is well.
const PATIENCE: Duration = Duration::from_secs(60);

/// Opens models that say their own name, as quickly as the test lets it.
#[derive(Default)]
struct Shelf {
    names: Mutex<Vec<String>>,
    /// What stands in for the memory plan, by name.
    refusals: Mutex<HashMap<String, LoadError>>,
    /// By name, whoever must have gone before there is room.
    crowds: Mutex<HashMap<String, String>>,
    /// Loads that wait for a word; others do not.
    gates: Mutex<HashMap<String, std::sync::mpsc::Receiver<()>>>,
    /// What was opened and ended, in order.
    log: Mutex<Vec<String>>,
    pace: Duration,
    fresh: Mutex<Vec<Known>>,
}

impl Shelf {
    fn log(&self) -> Vec<String> {
        self.log.lock().unwrap().clone()
    }

    /// The next load of `name` ends when the sender speaks or is dropped.
    fn gate(&self, name: &str) -> Sender<()> {
        let (open, opened) = channel();
        self.gates.lock().unwrap().insert(name.into(), opened);
        open
    }

    fn refuse(&self, name: &str, error: Option<LoadError>) {
        let mut refusals = self.refusals.lock().unwrap();
        match error {
            Some(error) => drop(refusals.insert(name.into(), error)),
            None => drop(refusals.remove(name)),
        }
    }
}

impl Loader for Shelf {
    fn start(&self, place: usize) -> Result<Resident, LoadError> {
        let name = self.names.lock().unwrap()[place].clone();
        if let Some(error) = self.refusals.lock().unwrap().get(&name) {
            return Err(error.clone());
        }
        if let Some(other) = self.crowds.lock().unwrap().get(&name)
            && !self.log().contains(&format!("-{other}"))
        {
            return Err(LoadError::NoRoom("too little".into()));
        }
        self.log.lock().unwrap().push(format!("+{name}"));
        let (text, gate) = (text(), self.gates.lock().unwrap().remove(&name));
        let network = scripted(&text, &format!(" {name}").repeat(40), self.pace);
        Ok(opening(place, known(&name).names, text, forgetful(), move || {
            let _ = gate.map(|gate| gate.recv());
            Ok(network)
        }))
    }

    fn ended(&self, place: usize) {
        let name = self.names.lock().unwrap()[place].clone();
        self.log.lock().unwrap().push(format!("-{name}"));
    }

    fn simulate(&self, simulation: &Simulation) -> Result<Estimate, LoadError> {
        let Target::Place(place) = simulation.target else {
            return Err(LoadError::Failed("no such path".into()));
        };
        Ok(Estimate {
            total: 100 * (place as u64 + 1),
            weights: 60,
            kv_per_token: 2,
            state_per_sequence: 3,
            activations: 4,
            free: Some((150.0 * simulation.share.unwrap_or(1.0)) as u64),
            concurrency: simulation.max_num_seqs.unwrap_or(8),
            max_model_len: simulation.max_model_len.unwrap_or(CONTEXT),
        })
    }

    fn rescan(&self) -> Result<Vec<Known>, LoadError> {
        let fresh = std::mem::take(&mut *self.fresh.lock().unwrap());
        self.names.lock().unwrap().extend(fresh.iter().map(|known| known.names[0].clone()));
        Ok(fresh)
    }
}

fn known(name: &str) -> Known {
    let model = ModelInfo {
        served_names: vec![name.into()],
        root: name.into(),
        created: 1,
        max_model_len: CONTEXT,
        vocab_size: VOCAB,
        stop_ids: vec![],
        defaults: SamplingDefaults::default(),
        facts: Facts::default(),
    };
    Known { model: Some(model), ..Known::named(vec![name.into(), format!("{name}-alias")]) }
}

/// A router in memory and its shelf.
struct World {
    server: Server,
    shelf: Arc<Shelf>,
}

/// Models `a`, `b` and `c`, none of them loaded.
fn world(pace: Duration, change: impl FnOnce(&mut Options)) -> World {
    let mut options = Options::new(Vec::new());
    options.models.clear();
    options.known = ["a", "b", "c"].map(known).into();
    options.sleep_mode = true;
    change(&mut options);
    let names = options.known.iter().map(|known| known.names[0].clone()).collect();
    let shelf = Arc::new(Shelf { names: Mutex::new(names), pace, ..Shelf::default() });
    let app = App::new(options);
    app.keeper.employ(shelf.clone());
    World { server: Server { app }, shelf }
}

fn keeping(change: impl FnOnce(&mut Keeping)) -> impl FnOnce(&mut Options) {
    |options| change(&mut options.keeping)
}

impl World {
    async fn says(&self, model: &str, status: StatusCode) -> Value {
        let (got, answer) = self.server.json(COMPLETIONS, short(model)).await;
        assert_eq!(got, status, "{model}: {answer}");
        answer
    }

    async fn status_of(&self, model: &str) -> Value {
        let (_, list) = self.server.get("/models").await;
        let list: Value = serde_json::from_str(&list).expect("JSON");
        let cards = list["data"].as_array().expect("a list");
        cards.iter().find(|card| card["id"] == json!(model)).expect("it is known")["status"].clone()
    }

    async fn until_status(&self, model: &str, value: &str) {
        let start = Instant::now();
        while self.status_of(model).await["value"] != json!(value) {
            assert!(start.elapsed() < PATIENCE, "{model} is never {value}: {}", self.status_of(model).await);
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    /// A stream that has begun.
    async fn stream(&self, model: &str) -> Response {
        let mut body = continued(json!(model));
        body["stream"] = json!(true);
        body["max_tokens"] = json!(100);
        let mut response = self.server.call(post(COMPLETIONS, body.to_string())).await;
        assert_eq!(response.status(), StatusCode::OK);
        let frame =
            std::future::poll_fn(|context| std::pin::Pin::new(response.body_mut()).poll_frame(context));
        assert!(frame.await.is_some(), "it begins");
        response
    }

    async fn post(&self, path: &str) -> (StatusCode, Value) {
        let (status, text) = read(self.server.call(post(path, Body::empty())).await).await;
        (status, serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}")))
    }
}

fn short(model: &str) -> Value {
    let mut body = continued(json!(model));
    body["max_tokens"] = json!(1);
    body
}

/// What is left of a stream has all that the model says, and its end.
fn check_whole(events: &str) {
    assert!(events.matches("\" a\"").count() >= 39 && !events.contains("error"), "{events}");
    assert!(events.contains("\"finish_reason\":\"stop\"") && events.contains("[DONE]"), "{events}");
}

fn message(error: &Value) -> String {
    error["error"]["message"].as_str().unwrap_or_default().to_owned()
}

#[tokio::test]
async fn a_model_comes_when_it_is_asked_for() {
    let world = world(Duration::ZERO, |_| ());
    assert_eq!(world.status_of("b").await["value"], json!("unloaded"));
    assert_eq!(world.server.get("/health").await.0, StatusCode::OK);
    let answer = world.says("b-alias", StatusCode::OK).await;
    assert_eq!(answer["choices"][0]["text"], json!(" b"), "{answer}");
    assert_eq!(world.status_of("b").await["value"], json!("loaded"));
    assert_eq!(world.shelf.log(), ["+b"]);
    let unnamed = json!({"prompt": "Once", "temperature": 0, "max_tokens": 1});
    let (_, answer) = world.server.json(COMPLETIONS, unnamed).await;
    assert_eq!(answer["model"], json!("a"), "the first answers who names none");
    let (_, list) = world.server.get("/v1/models").await;
    let list: Value = serde_json::from_str(&list).expect("JSON");
    let cards: Vec<_> =
        list["data"].as_array().expect("a list").iter().map(|c| (&c["id"], &c["status"])).collect();
    assert_eq!(cards[2], (&json!("b"), &json!("loaded")));
    assert_eq!(cards[5], (&json!("c-alias"), &json!("unloaded")));
    assert_eq!(list["data"][5]["max_model_len"], json!(CONTEXT));
    assert_eq!(world.server.get("/v1/models/c").await.0, StatusCode::OK);
    world.says("d", StatusCode::NOT_FOUND).await;
}

#[tokio::test]
async fn requests_that_race_a_load_wait_for_it_and_it_happens_once() {
    let world = world(Duration::ZERO, |_| ());
    let gate = world.shelf.gate("a");
    let asked = (0..8).map(|_| world.says("a", StatusCode::OK));
    let opened = async {
        world.until_status("a", "loading").await;
        drop(gate);
    };
    let (answers, ()) = tokio::join!(futures_util::future::join_all(asked), opened);
    assert_eq!(answers.len(), 8);
    assert_eq!(world.shelf.log(), ["+a"]);
}

#[tokio::test]
async fn the_idle_one_makes_room_and_the_busy_one_never() {
    let world = world(Duration::from_millis(5), keeping(|keeping| keeping.most = 2));
    let stream = world.stream("a").await;
    world.says("b", StatusCode::OK).await;
    // `a` was used longer ago, and answers still.
    world.says("c", StatusCode::OK).await;
    assert_eq!(world.shelf.log(), ["+a", "+b", "-b", "+c"]);
    let (_, events) = read(stream).await;
    check_whole(&events);
}

#[tokio::test]
async fn who_finds_everybody_busy_waits_for_an_end_or_is_told() {
    let world = world(
        Duration::from_millis(5),
        keeping(|keeping| {
            (keeping.most, keeping.patience) = (1, Duration::from_millis(50));
        }),
    );
    let stream = world.stream("a").await;
    let response = world.server.call(post(COMPLETIONS, short("b").to_string())).await;
    assert_eq!(response.headers()[header::RETRY_AFTER], "5");
    let (status, text) = read(response).await;
    assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
    assert!(text.contains("no room"), "{text}");
    let leaves = async {
        tokio::time::sleep(Duration::from_millis(20)).await;
        drop(stream);
    };
    let (answer, ()) = tokio::join!(world.says("b", StatusCode::OK), leaves);
    assert_eq!(answer["choices"][0]["text"], json!(" b"));
    assert_eq!(world.shelf.log(), ["+a", "-a", "+b"]);
}

#[tokio::test]
async fn a_client_that_leaves_the_queue_takes_its_wish_along() {
    let world = world(Duration::from_millis(5), keeping(|keeping| keeping.most = 1));
    let stream = world.stream("a").await;
    let waits = world.says("b", StatusCode::OK);
    assert!(tokio::time::timeout(Duration::from_millis(30), waits).await.is_err());
    assert_eq!(world.status_of("b").await["value"], json!("unloaded"));
    drop(stream);
    world.says("a", StatusCode::OK).await;
    assert_eq!(world.shelf.log(), ["+a"]);
}

#[tokio::test]
async fn load_and_unload_are_asked_for_by_name() {
    let world = world(Duration::ZERO, |_| ());
    let ask = async |path: &str, body: Value, status: StatusCode, words: &str| {
        let (got, answer) = world.server.json(path, body).await;
        assert_eq!(got, status, "{answer}");
        assert!(answer.to_string().contains(words), "{answer}");
    };
    let (load, unload) = ("/models/load", "/models/unload");
    let a = || json!({"model": "a"});
    let gate = world.shelf.gate("a");
    ask(load, a(), StatusCode::OK, "true").await;
    assert_eq!(world.status_of("a").await["value"], json!("loading"), "it says so at once");
    ask(load, a(), StatusCode::BAD_REQUEST, "already loading").await;
    ask(unload, a(), StatusCode::BAD_REQUEST, "still loading").await;
    drop(gate);
    world.until_status("a", "loaded").await;
    ask(load, a(), StatusCode::BAD_REQUEST, "already loaded").await;
    ask(unload, json!({"model": "b"}), StatusCode::BAD_REQUEST, "not loaded").await;
    ask(unload, a(), StatusCode::OK, "true").await;
    world.until_status("a", "unloaded").await;
    for path in [load, unload] {
        ask(path, json!({"model": "d"}), StatusCode::NOT_FOUND, "`d`").await;
        ask(path, json!({}), StatusCode::BAD_REQUEST, "`model` is required").await;
        ask(path, json!({"model": 7}), StatusCode::BAD_REQUEST, "a string").await;
    }
    assert_eq!(world.shelf.log(), ["+a", "-a"]);
}

#[tokio::test]
async fn what_is_unloaded_first_finishes_its_requests() {
    let world = world(Duration::from_millis(5), |_| ());
    let stream = world.stream("a").await;
    let (status, _) = world.server.json("/models/unload", json!({"model": "a"})).await;
    assert_eq!(status, StatusCode::OK);
    assert_eq!(world.server.get("/health").await.0, StatusCode::OK);
    let again = world.says("a", StatusCode::OK);
    let ((_, events), _) = tokio::join!(read(stream), again);
    check_whole(&events);
    assert_eq!(
        world.shelf.log(),
        ["+a", "-a", "+a"],
        "who asked in between waited for the end and loaded it again"
    );
}

#[tokio::test]
async fn what_does_not_finish_in_time_is_told() {
    let world = world(Duration::from_millis(20), |options| {
        options.known[0].stop_timeout = Duration::from_millis(30);
    });
    let stream = world.stream("a").await;
    world.server.json("/models/unload", json!({"model": "a"})).await;
    let (_, events) = read(stream).await;
    assert!(events.contains("The model was unloaded before") && events.contains("\"code\":503"), "{events}");
    world.until_status("a", "unloaded").await;
}

#[tokio::test]
async fn what_does_not_fit_is_refused_in_the_words_of_the_plan() {
    let world = world(Duration::ZERO, |_| ());
    let words = "the plan needs 9 GB of memory and 1 GB are free";
    world.shelf.refuse("a", Some(LoadError::NeverFits(words.into())));
    let error = world.says("a", StatusCode::BAD_REQUEST).await;
    assert!(message(&error).contains(words) && error["error"]["param"] == json!("model"), "{error}");
    let (status, error) = world.server.json("/models/load", json!({"model": "a"})).await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
    assert!(message(&error).contains(words), "{error}");
    let state = world.status_of("a").await;
    assert_eq!(
        (&state["value"], &state["failed"], &state["exit_code"]),
        (&json!("unloaded"), &json!(true), &json!(1))
    );
    world.shelf.refuse("a", None);
    world.says("a", StatusCode::OK).await;
    assert!(world.status_of("a").await["failed"].is_null(), "that is over");
}

#[tokio::test]
async fn where_memory_is_short_the_idle_make_room_one_by_one() {
    let world = world(Duration::ZERO, |_| ());
    world.says("a", StatusCode::OK).await;
    world.says("b", StatusCode::OK).await;
    world.shelf.crowds.lock().unwrap().insert("c".into(), "b".into());
    world.says("c", StatusCode::OK).await;
    assert_eq!(world.shelf.log(), ["+a", "+b", "-a", "-b", "+c"]);
}

#[tokio::test]
async fn a_model_that_breaks_in_its_load_says_why_and_harms_nobody() {
    let world = world(Duration::ZERO, |_| ());
    world.says("b", StatusCode::OK).await;
    world.shelf.refuse("a", Some(LoadError::Failed("model.safetensors: the header lies".into())));
    let error = world.says("a", StatusCode::SERVICE_UNAVAILABLE).await;
    assert!(message(&error).contains("the header lies"), "{error}");
    world.says("b", StatusCode::OK).await;
    assert_eq!(world.server.get("/health").await.0, StatusCode::OK);
}

#[tokio::test]
async fn without_autoload_only_who_says_so_loads() {
    let world = world(Duration::ZERO, keeping(|keeping| keeping.autoload = false));
    let (status, health) = world.server.get("/health").await;
    assert_eq!((status, health.as_str()), (StatusCode::SERVICE_UNAVAILABLE, r#"{"status":"unloaded"}"#));
    let error = world.says("a", StatusCode::BAD_REQUEST).await;
    assert!(message(&error).contains("is not loaded"), "{error}");
    let path = format!("{COMPLETIONS}?autoload=true");
    assert_eq!(world.server.json(&path, short("a")).await.0, StatusCode::OK);
    let path = format!("{COMPLETIONS}?autoload=maybe");
    assert_eq!(world.server.json(&path, short("a")).await.0, StatusCode::BAD_REQUEST);
    assert_eq!(world.server.get("/health").await.0, StatusCode::OK);
}

#[tokio::test]
async fn new_models_are_found_when_somebody_looks() {
    let world = world(Duration::ZERO, |_| ());
    world.shelf.fresh.lock().unwrap().push(known("d"));
    world.says("d", StatusCode::NOT_FOUND).await;
    assert_eq!(world.server.get("/models?reload=1").await.0, StatusCode::OK);
    world.says("d", StatusCode::OK).await;
    let (_, page) = world.server.get("/metrics?model=d").await;
    assert!(page.contains("model_name=\"d\"") && !page.contains("model_name=\"a\""), "{page}");
    assert_eq!(world.server.get("/metrics?model=e").await.0, StatusCode::NOT_FOUND);
}

#[tokio::test]
async fn a_paused_model_goes_on_where_it_was() {
    let world = world(Duration::from_millis(5), |_| ());
    let stream = world.stream("a").await;
    let (status, answer) = world.post("/sleep?level=0&mode=keep").await;
    assert_eq!((status, answer), (StatusCode::OK, json!({"status": "sleeping", "level": 0})));
    assert_eq!(world.server.get("/is_sleeping").await.1, r#"{"is_sleeping":true}"#);
    assert_eq!(world.server.get("/health").await.0, StatusCode::OK);
    let response = world.server.call(post(COMPLETIONS, short("a").to_string())).await;
    assert_eq!(
        (response.status(), &response.headers()[header::RETRY_AFTER]),
        (StatusCode::SERVICE_UNAVAILABLE, &"5".parse().unwrap())
    );
    let (status, answer) = world.post("/wake_up").await;
    assert_eq!((status, &answer["status"]), (StatusCode::OK, &json!("awake")));
    let (_, events) = read(stream).await;
    check_whole(&events);
    assert_eq!(world.shelf.log(), ["+a"], "it never left");
}

#[tokio::test]
async fn a_model_that_sleeps_deep_gives_its_memory_back_and_comes_again() {
    let world = world(Duration::from_millis(5), |_| ());
    world.says("b", StatusCode::OK).await;
    let stream = world.stream("a").await;
    assert_eq!(world.post("/sleep?model=a&level=2").await.0, StatusCode::OK);
    let (_, events) = read(stream).await;
    assert!(events.contains("put to sleep"), "{events}");
    assert_eq!(world.status_of("a").await["value"], json!("sleeping"));
    assert_eq!(world.shelf.log(), ["+b", "+a", "-a"]);
    assert_eq!(world.server.get("/is_sleeping").await.1, r#"{"is_sleeping":false}"#, "b is awake");
    assert_eq!(world.server.get("/is_sleeping?model=a").await.1, r#"{"is_sleeping":true}"#);
    let (_, page) = world.server.get("/metrics").await;
    let series = "vllm:engine_sleep_state{model_name=\"a\",engine=\"0\",sleep_state=\"discard_all\"} 1";
    assert!(page.contains(series), "{page}");
    let error = world.says("a", StatusCode::SERVICE_UNAVAILABLE).await;
    assert!(message(&error).contains("asleep"), "{error}");
    world.says("b", StatusCode::OK).await;
    assert_eq!(world.post("/sleep?model=a").await.0, StatusCode::OK, "it sleeps already");
    // One part alone does not wake it.
    assert_eq!(world.post("/wake_up?tags=weights").await.1["tags"], json!(["weights"]));
    assert_eq!(world.server.get("/is_sleeping?model=a").await.1, r#"{"is_sleeping":true}"#);
    assert_eq!(world.post("/wake_up?tags=kv_cache").await.0, StatusCode::OK);
    world.says("a", StatusCode::OK).await;
    assert_eq!(world.shelf.log(), ["+b", "+a", "-a", "+a"]);
}

#[tokio::test]
async fn mode_wait_lets_answers_end_first() {
    let world = world(Duration::from_millis(2), |_| ());
    let stream = world.stream("a").await;
    let ((status, _), (_, events)) = tokio::join!(world.post("/sleep?level=1&mode=wait"), read(stream));
    assert_eq!(status, StatusCode::OK);
    check_whole(&events);
    assert_eq!(world.shelf.log(), ["+a", "-a"]);
}

#[tokio::test]
async fn who_may_wake_a_model_does() {
    let world = world(Duration::ZERO, keeping(|keeping| keeping.auto_wake = true));
    world.says("a", StatusCode::OK).await;
    for level in [0, 1, 2] {
        assert_eq!(world.post(&format!("/sleep?level={level}")).await.0, StatusCode::OK);
        world.says("a", StatusCode::OK).await;
    }
    assert_eq!(world.shelf.log(), ["+a", "-a", "+a", "-a", "+a"]);
}

#[tokio::test]
async fn a_model_that_nobody_asks_for_sleeps_until_somebody_does() {
    let world = world(Duration::ZERO, |_| ());
    tokio::spawn(world.server.app.keeper.clone().doze(Duration::from_millis(20)));
    world.says("a", StatusCode::OK).await;
    world.until_status("a", "sleeping").await;
    world.says("a", StatusCode::OK).await;
    assert_eq!(world.shelf.log()[..3], ["+a", "-a", "+a"]);
}

#[tokio::test]
async fn sleep_is_there_for_those_who_asked_for_it_and_says_what_it_does_not_know() {
    let server = world(Duration::ZERO, |options| options.sleep_mode = false).server;
    for path in ["/sleep", "/wake_up", "/reset_prefix_cache"] {
        assert_eq!(server.call(post(path, Body::empty())).await.status(), StatusCode::NOT_FOUND, "{path}");
    }
    assert_eq!(server.get("/is_sleeping").await.0, StatusCode::NOT_FOUND);
    let world = world(Duration::ZERO, |_| ());
    let check = async |path: &str, status: StatusCode, param: Value| {
        let (got, error) = world.post(path).await;
        assert_eq!((got, &error["error"]["param"]), (status, &param), "{path}: {error}");
    };
    check("/sleep?level=3", StatusCode::BAD_REQUEST, json!("level")).await;
    check("/sleep?mode=soon", StatusCode::BAD_REQUEST, json!("mode")).await;
    check("/sleep?level=1&mode=keep", StatusCode::BAD_REQUEST, json!("mode")).await;
    check("/sleep?model=d", StatusCode::NOT_FOUND, json!("model")).await;
    check("/wake_up?tags=all", StatusCode::BAD_REQUEST, json!("tags")).await;
    check("/sleep?level=%ff%", StatusCode::BAD_REQUEST, json!("level")).await;
    assert_eq!(world.post("/reset_prefix_cache").await, (StatusCode::OK, json!({"success": true})));
}

#[tokio::test]
async fn a_simulation_tells_what_would_be_taken() {
    let world = world(Duration::ZERO, |_| ());
    let (status, told) = world.server.json("/simulate", json!({"model": "a", "max_num_seqs": 3})).await;
    assert_eq!(status, StatusCode::OK);
    let expected = json!({
        "fits": true, "total_bytes": 100, "weights_bytes": 60, "kv_bytes_per_token": 2, "ssm_state_bytes_per_seq": 3,
        "activation_bytes": 4, "cuda_graph_bytes": 0, "free_bytes": 150, "max_concurrency": 3, "max_model_len": CONTEXT,
    });
    assert_eq!(told, expected);
    let less = world.server.json("/simulate", json!({"model": "a", "gpu_memory_utilization": 0.5})).await;
    assert_eq!(less.1["fits"], json!(false));
    assert_eq!(world.server.json("/simulate", json!({"model": "d"})).await.0, StatusCode::NOT_FOUND);
    for body in
        [json!({"path": "/nowhere"}), json!({"max_num_seqs": 0}), json!({"gpu_memory_utilization": 1.5})]
    {
        assert_eq!(world.server.json("/simulate", body.clone()).await.0, StatusCode::BAD_REQUEST, "{body}");
    }
    assert!(world.shelf.log().is_empty(), "nothing is loaded");
}

#[tokio::test]
async fn at_the_end_who_waits_is_told() {
    let world = world(Duration::ZERO, |_| ());
    let _gate = world.shelf.gate("a");
    let ends = async {
        world.until_status("a", "loading").await;
        world.server.app.set_draining();
    };
    let (error, ()) = tokio::join!(world.says("a", StatusCode::SERVICE_UNAVAILABLE), ends);
    assert!(message(&error).contains("shutting down"), "{error}");
}
