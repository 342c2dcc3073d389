//! What is counted, under vLLM's names, so that its dashboards work here. Colons in names stay colons.
//!
//! Every series exists with 0 from the start, so that `rate()` has a beginning.

use super::exposition::{self, Page, View};
use super::meter::ModelMetrics;
use prometheus::{
    Encoder, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, Opts, Registry, TextEncoder,
};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

const HTTP_SECONDS: [f64; 12] = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0];

/// The counters of the wire. Those of the engines are read when somebody asks.
pub struct Metrics {
    registry: Registry,
    started: Instant,
    /// In the order of the models: the front one first.
    models: RwLock<Vec<Arc<ModelMetrics>>>,
    http_requests: IntCounterVec,
    http_seconds: HistogramVec,
    sleep_seconds: HistogramVec,
}

impl Metrics {
    /// `names`: the canonical name of each model.
    pub fn new(names: &[&str]) -> Self {
        let registry = Registry::new();
        let plain = Maker { registry: &registry, model_name: "", engine: 0 };
        let metrics = Self {
            started: Instant::now(),
            models: RwLock::default(),
            http_requests: plain.plain_counters(
                "http_requests_total",
                "HTTP requests.",
                &["handler", "method", "status"],
            ),
            http_seconds: plain.plain_histograms(
                "http_request_duration_seconds",
                "Until the response's head.",
                &["handler", "method"],
            ),
            sleep_seconds: plain.plain_histograms(
                "vllm:sleep_mode_operation_duration_seconds",
                "Until models slept or were awake.",
                &["operation"],
            ),
            registry: registry.clone(),
        };
        for operation in ["sleep", "wake_up"] {
            metrics.sleep_seconds.with_label_values(&[operation]);
        }
        for (method, handler) in
            [("POST", "/v1/chat/completions"), ("POST", "/v1/completions"), ("GET", "/v1/models")]
        {
            metrics.http_requests.with_label_values(&[handler, method, "2xx"]);
            metrics.http_seconds.with_label_values(&[handler, method]);
        }
        names.iter().for_each(|name| metrics.add(name));
        metrics
    }

    /// One more model, behind all others.
    pub fn add(&self, name: &str) {
        let mut models = self.models.write().unwrap_or_else(PoisonError::into_inner);
        let maker = Maker { registry: &self.registry, model_name: name, engine: models.len() };
        models.push(Arc::new(ModelMetrics::new(&maker)));
    }

    /// The counters of the model at `index`, which must have been added.
    pub fn model(&self, index: usize) -> Arc<ModelMetrics> {
        self.models.read().unwrap_or_else(PoisonError::into_inner)[index].clone()
    }

    /// Requests being answered, for `/load`.
    pub fn in_flight(&self) -> usize {
        let models = self.models.read().unwrap_or_else(PoisonError::into_inner);
        models.iter().map(|model| model.in_flight()).sum()
    }

    /// One HTTP request; `handler` is the route's pattern, never the client's path.
    pub fn http(&self, handler: &str, method: &str, status: u16, elapsed: Duration) {
        let group = format!("{}xx", status / 100);
        self.http_requests.with_label_values(&[handler, method, &group]).inc();
        self.http_seconds.with_label_values(&[handler, method]).observe(elapsed.as_secs_f64());
    }

    /// Models were put to sleep or woken.
    pub fn sleep_mode(&self, operation: &str, elapsed: Duration) {
        self.sleep_seconds.with_label_values(&[operation]).observe(elapsed.as_secs_f64());
    }

    /// The whole page in Prometheus' text format: one view per model, in order.
    pub fn page(&self, views: &[View]) -> String {
        let mut text = Vec::new();
        // Fails only if a family is empty or the writer fails; neither a filled family nor a Vec does.
        if let Err(error) = TextEncoder::new().encode(&self.registry.gather(), &mut text) {
            tracing::error!("metrics: {error}");
        }
        let mut page = Page::new(String::from_utf8_lossy(&text).into_owned());
        exposition::engines(&mut page, views);
        super::process::write(&mut page);
        page.into_text()
    }

    /// How long the server has been up.
    pub fn uptime(&self) -> Duration {
        self.started.elapsed()
    }
}

/// Makes and registers collectors with the labels that all engine metrics carry.
pub struct Maker<'a> {
    registry: &'a Registry,
    model_name: &'a str,
    /// The model's place.
    engine: usize,
}

impl Maker<'_> {
    pub fn histogram(&self, name: &str, help: &str, buckets: &[f64]) -> Histogram {
        let options = HistogramOpts::new(name, help)
            .buckets(buckets.to_vec())
            .const_label("model_name", self.model_name)
            .const_label("engine", self.engine.to_string());
        let histogram =
            Histogram::with_opts(options).expect("the constants above are valid names and buckets");
        self.register(histogram)
    }

    pub fn counter(&self, name: &str, help: &str) -> IntCounter {
        let counter = IntCounter::with_opts(self.labelled(name, help));
        self.register(counter.expect("the constants above are valid names"))
    }

    pub fn counters(&self, name: &str, help: &str, label: &str) -> IntCounterVec {
        let counters = IntCounterVec::new(self.labelled(name, help), &[label]);
        self.register(counters.expect("the constants above are valid names"))
    }

    fn plain_counters(&self, name: &str, help: &str, labels: &[&str]) -> IntCounterVec {
        let counters = IntCounterVec::new(Opts::new(name, help), labels);
        self.register(counters.expect("the constants above are valid names"))
    }

    fn plain_histograms(&self, name: &str, help: &str, labels: &[&str]) -> HistogramVec {
        let options = HistogramOpts::new(name, help).buckets(HTTP_SECONDS.to_vec());
        let histograms = HistogramVec::new(options, labels);
        self.register(histograms.expect("the constants above are valid names and buckets"))
    }

    fn labelled(&self, name: &str, help: &str) -> Opts {
        Opts::new(name, help)
            .const_label("model_name", self.model_name)
            .const_label("engine", self.engine.to_string())
    }

    fn register<C: prometheus::core::Collector + Clone + 'static>(&self, collector: C) -> C {
        self.registry.register(Box::new(collector.clone())).expect("each name above is registered once");
        collector
    }
}
