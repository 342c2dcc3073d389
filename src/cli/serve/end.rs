//! How a server ends: because it was asked to, or because an engine died.

use crate::api::{App, Resident};
use crate::engine::Status;
use anyhow::{Context as _, bail};
use futures_util::FutureExt as _;
use std::io;
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::{JoinError, JoinHandle};

/// After an engine's death the process ends within two seconds, so that whoever started it starts it again; until
/// then its last answers may leave.
const DEATH_GRACE: Duration = Duration::from_millis(1800);
/// Waits for the end of the server, or of an engine, which ends the server with it unless it `outlives` that.
/// Errors: why the engine died.
pub async fn until_end(
    app: &App,
    mut server: JoinHandle<io::Result<()>>,
    stop: &watch::Sender<bool>,
    outlives: bool,
) -> anyhow::Result<()> {
    let reason = tokio::select! {
        served = &mut server => return ended(served),
        reason = death(app) => reason,
    };
    tracing::error!("The engine stopped: {reason}");
    if outlives {
        ended(server.await)?;
    } else {
        let farewell = async {
            // The other engines' readers are told at once; then every answer has its end.
            app.shutdown(Duration::ZERO).await;
            stop.send_replace(true);
            server.await
        };
        // Whoever has not read its answer by then never will.
        let _ = tokio::time::timeout(DEATH_GRACE, farewell).await;
    }
    bail!("the engine stopped: {reason}")
}

/// What the server's task came to.
pub fn ended(server: Result<io::Result<()>, JoinError>) -> anyhow::Result<()> {
    server.context("the server's task failed")?.context("the server failed")
}

/// Resolves with the reason when an engine dies; never if all end as asked.
pub async fn death(app: &App) -> String {
    let mut changes = app.keeper.changes();
    loop {
        let mut ends: Vec<_> = app.residents().into_iter().map(|resident| died(resident).boxed()).collect();
        // Where nobody is, nobody dies.
        ends.push(std::future::pending().boxed());
        tokio::select! {
            (reason, ..) = futures_util::future::select_all(ends) => return reason,
            // Somebody may have come or gone.
            _ = changes.changed() => {}
        }
    }
}

async fn died(resident: Resident) -> String {
    resident.engine.ended().await;
    match resident.engine.status() {
        Status::Dead(reason) => reason,
        _ => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::{self, Drain, Facts, ModelInfo, Options, SamplingDefaults};
    use crate::backend::StepInputs;
    use crate::engine::{self, EngineConfig};
    use crate::model::{Limits, Network, StepError};
    use crate::text::{Text, TextFiles};
    use std::sync::{Arc, mpsc};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::{TcpListener, TcpStream};

    const VOCAB: usize = 4096;
    const LIMITS: Limits = Limits {
        step_tokens: 64,
        logit_rows: 64,
        slots: 4,
        blocks: 64,
        block_len: 16,
        lanes: 0,
        drafts: 0,
        kv: crate::backend::KvType::Auto,
        ssm: crate::backend::SsmType::F32,
    };

    /// Says the same id until it is told to fail.
    struct Failing {
        fail: mpsc::Receiver<()>,
        logits: Vec<f32>,
    }

    impl Network for Failing {
        fn vocab_size(&self) -> usize {
            VOCAB
        }

        fn limits(&self) -> &Limits {
            &LIMITS
        }

        fn step(&mut self, inputs: &StepInputs) -> Result<&[f32], StepError> {
            if self.fail.try_recv().is_ok() {
                return Err(StepError::Device("it burns".into()));
            }
            // So slow that the stream is still open when it fails.
            std::thread::sleep(Duration::from_millis(5));
            self.logits.clear();
            self.logits.resize(inputs.logit_rows.len() * VOCAB, 0.0);
            self.logits.chunks_mut(VOCAB).for_each(|row| row[300] = 50.0);
            Ok(&self.logits)
        }
    }

    async fn resident(index: usize) -> (Resident, mpsc::Sender<()>) {
        let text = Text::load(TextFiles {
            tokenizer_json: include_bytes!("../../../models/tiny/tokenizer.json"),
            tokenizer_config: None,
            chat_template: None,
        });
        let (fail, told) = mpsc::channel();
        let network = Failing { fail: told, logits: Vec::new() };
        let (engine, _) = engine::start(EngineConfig::default(), move |_| Ok(Box::new(network)));
        engine.loaded().await;
        let model = ModelInfo {
            served_names: vec![format!("model-{index}")],
            root: "tiny".into(),
            created: 0,
            max_model_len: 1024,
            vocab_size: VOCAB,
            stop_ids: vec![],
            defaults: SamplingDefaults::default(),
            facts: Facts::default(),
        };
        let text = Arc::new(text.expect("the tiny model's own file"));
        (Resident { index, text, engine, model: Arc::new(model) }, fail)
    }

    /// A client that asks `model` for an endless stream.
    async fn client(address: std::net::SocketAddr, model: &str) -> TcpStream {
        let body = format!(r#"{{"model":"{model}","prompt":"x","stream":true,"max_tokens":1000}}"#);
        let mut stream = TcpStream::connect(address).await.expect("the server listens");
        let length = body.len();
        let head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json";
        let request = format!("{head}\r\nContent-Length: {length}\r\n\r\n{body}");
        stream.write_all(request.as_bytes()).await.expect("the server reads");
        let mut first = [0; 512];
        assert!(stream.read(&mut first).await.is_ok_and(|read| read > 0), "the stream has begun");
        stream
    }

    /// Two models behind a listening server; the one behind fails when told.
    struct World {
        app: Arc<App>,
        address: std::net::SocketAddr,
        stop: watch::Sender<bool>,
        server: JoinHandle<io::Result<()>>,
        fail: mpsc::Sender<()>,
        _front: mpsc::Sender<()>,
    }

    async fn world() -> World {
        let mut options = Options::new(Vec::new());
        options.models = vec![vec!["model-0".into()], vec!["model-1".into()]];
        let app = App::new(options);
        let ((front, _front), (behind, fail)) = (resident(0).await, resident(1).await);
        app.set_resident(front);
        app.set_resident(behind);
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("it is bound");
        let (stop, mut stopped) = watch::channel(false);
        let signal = async move {
            let _ = stopped.wait_for(|stop| *stop).await;
        };
        let drain = Drain { signal, timeout: Duration::from_secs(600) };
        let server = tokio::spawn(api::serve(listener, app.clone(), drain));
        World { app, address, stop, server, fail, _front }
    }

    async fn reason(end: impl Future<Output = anyhow::Result<()>>) -> String {
        let end = tokio::time::timeout(Duration::from_secs(60), end).await.expect("it ends");
        end.expect_err("a death is no success").to_string()
    }

    const REASON: &str = "the engine stopped: the device failed: it burns";

    #[tokio::test(flavor = "multi_thread")]
    async fn when_an_engine_dies_every_reader_is_told_and_the_server_ends_with_its_reason() {
        let World { app, address, stop, server, fail, _front } = world().await;
        let mut readers = [client(address, "model-0").await, client(address, "model-1").await];
        // Never reads on, and must not hold up the end.
        let _deaf = client(address, "model-0").await;

        fail.send(()).expect("the network lives");
        assert_eq!(reason(until_end(&app, server, &stop, false)).await, REASON);
        for (reader, code) in readers.iter_mut().zip(["503", "500"]) {
            let mut text = String::new();
            reader.read_to_string(&mut text).await.expect("the server closes properly");
            assert!(text.contains(&format!("\"code\":{code}")) && text.contains("data: [DONE]"), "{text}");
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_server_that_outlives_its_engine_ends_when_asked_and_still_says_why() {
        let World { app, address, stop, server, fail, _front } = world().await;
        let mut reader = client(address, "model-1").await;
        fail.send(()).expect("the network lives");
        let asked = async {
            let mut read = Vec::new();
            // The answer is over; the connection stays, as long as the server does.
            while !read.ends_with(b"0\r\n\r\n") {
                read.push(reader.read_u8().await.expect("the server lives"));
            }
            // The answer's last bytes may come before the engine's end is told.
            while !matches!(app.health(), api::Health::Dead(_)) {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            client(address, "model-0").await;
            assert!(!*stop.borrow());
            stop.send_replace(true);
            app.shutdown(Duration::ZERO).await;
        };
        let (reason, ()) = tokio::join!(reason(until_end(&app, server, &stop, true)), asked);
        assert_eq!(reason, REASON);
    }

    #[test]
    fn the_end_comes_within_two_seconds() {
        assert!(DEATH_GRACE < Duration::from_secs(2));
    }
}
