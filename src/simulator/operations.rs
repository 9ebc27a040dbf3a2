//! The provider's other operations: changed voices, cleaned audio, dubbing, music, alignment and
//! the studio. A table lists the requirements, the cost and the response of each.
//!
//! Sources: the OpenAPI document (paths, parts, responses), the documentation and price lists of
//! 2026 (credits per minute). The length of an upload follows a rule of the simulator, see `job`.

use http::Method;
use serde_json::{Map, Value, json};

use crate::clock;

use super::accounts::Refused;
use super::answer::{Answer, AnswerBody, set, trace_id};
use super::job::{GeneratedAudio, Job, UPLOAD_BYTES_PER_SECOND, require_key};
use super::music;
use super::resources::{Kind, Resource};
use super::shape::{Shape, fixed_refusal};
use super::sound::format::Format;
use super::sound::melody::Melody;
use super::sound::{Sound, seconds};
use super::speech::{streamed, whole};

/// An operation of the table.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Operation {
    method: &'static str,
    /// Its path segments; `{}` is an identifier.
    path: &'static str,
    pub(super) permission: &'static str,
    /// Required form parts.
    parts: &'static [&'static str],
    price: Price,
    yields: Yields,
}

/// The price of an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Price {
    Free,
    /// Credits per minute of the upload.
    UploadedMinute(u64),
    /// Credits per minute of the requested music.
    MusicMinute(u64),
}

/// The response of an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Yields {
    /// Audio of the upload's length in another voice.
    Voice(Flow),
    /// Audio of the upload's length without noise.
    Audio(Flow),
    Music(Flow),
    /// The music with its description, as two parts.
    DetailedMusic,
    /// The composition plan.
    MusicPlan,
    Alignment,
    Added(Kind),
    List(Kind),
    One(Kind),
    Gone(Kind),
    DubbedAudio,
}

/// The transfer of the audio in the response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Flow {
    Whole,
    Stream,
}

const fn operation(
    method: &'static str,
    path: &'static str,
    permission: &'static str,
    parts: &'static [&'static str],
    price: Price,
    yields: Yields,
) -> Operation {
    Operation { method, path, permission, parts, price, yields }
}

/// The table of operations. Voices and cleaned audio cost 1,000 credits per minute (the
/// documentation); the costs of the others are converted from the price lists.
#[rustfmt::skip] // a table, one operation to a line
const OPERATIONS: &[Operation] = {
    use Flow::{Stream, Whole};
    use Yields::{Added, Alignment, Audio, DetailedMusic, DubbedAudio, Gone, List, Music, MusicPlan, One, Voice};
    use Kind::{Dubbing, Project};
    use Price::{Free, MusicMinute, UploadedMinute};
    const MINUTE: Price = UploadedMinute(1_000);
    const MUSIC: Price = MusicMinute(3_000);
    &[
        operation("POST", "v1/speech-to-speech/{}", "speech_to_speech", &["audio"], MINUTE, Voice(Whole)),
        operation("POST", "v1/speech-to-speech/{}/stream", "speech_to_speech", &["audio"], MINUTE, Voice(Stream)),
        operation("POST", "v1/voice-changer/{}", "speech_to_speech", &["audio"], MINUTE, Voice(Whole)),
        operation("POST", "v1/voice-changer/{}/stream", "speech_to_speech", &["audio"], MINUTE, Voice(Stream)),
        operation("POST", "v1/audio-isolation", "audio_isolation", &["audio"], MINUTE, Audio(Whole)),
        operation("POST", "v1/audio-isolation/stream", "audio_isolation", &["audio"], MINUTE, Audio(Stream)),
        operation("POST", "v1/dubbing", "dubbing_write", &["target_lang"], UploadedMinute(3_000), Added(Dubbing)),
        operation("GET", "v1/dubbing", "dubbing_read", &[], Free, List(Dubbing)),
        operation("GET", "v1/dubbing/{}", "dubbing_read", &[], Free, One(Dubbing)),
        operation("DELETE", "v1/dubbing/{}", "dubbing_write", &[], Free, Gone(Dubbing)),
        operation("GET", "v1/dubbing/{}/audio/{}", "dubbing_read", &[], Free, DubbedAudio),
        operation("POST", "v1/music", "music_generation", &[], MUSIC, Music(Whole)),
        operation("POST", "v1/music/stream", "music_generation", &[], MUSIC, Music(Stream)),
        operation("POST", "v1/music/detailed", "music_generation", &[], MUSIC, DetailedMusic),
        operation("POST", "v1/music/plan", "music_generation", &[], Free, MusicPlan),
        operation("POST", "v1/forced-alignment", "forced_alignment", &["file", "text"], UploadedMinute(60), Alignment),
        operation("POST", "v1/studio/projects", "projects_write", &["name"], Free, Added(Project)),
        operation("GET", "v1/studio/projects", "projects_read", &[], Free, List(Project)),
        operation("GET", "v1/studio/projects/{}", "projects_read", &[], Free, One(Project)),
        operation("DELETE", "v1/studio/projects/{}", "projects_write", &[], Free, Gone(Project)),
    ]
};

/// Maximum length of audio that is generated from an upload.
const MAX_GENERATED_MS: u64 = 60_000;

impl Operation {
    /// The operation of a path, and the identifiers in the path.
    ///
    /// # Errors
    ///
    /// The provider's 404 and 405.
    pub(super) fn find(method: &Method, segments: &[&str]) -> Result<(&'static Self, Vec<String>), Shape> {
        let mut other_method = None;
        for operation in OPERATIONS {
            let Some(ids) = operation.ids(segments) else { continue };
            if operation.method == method.as_str() {
                return Ok((operation, ids));
            }
            other_method.get_or_insert(operation.method);
        }
        Err(other_method.map_or(Shape::NotFound, Shape::MethodNotAllowed))
    }

    fn ids(&self, segments: &[&str]) -> Option<Vec<String>> {
        let expected: Vec<&str> = self.path.split('/').collect();
        let fits = |(expected, segment): (&&str, &&str)| *expected == "{}" || expected == segment;
        if expected.len() != segments.len() || !expected.iter().zip(segments).all(fits) {
            return None;
        }
        let ids = expected.iter().zip(segments).filter(|(expected, _)| **expected == "{}");
        Some(ids.map(|(_, segment)| (*segment).to_owned()).collect())
    }

    /// The cost of a request, derived from its body.
    pub(super) fn cost(&self, job: Job<'_>) -> u64 {
        match self.price {
            Price::Free => 0,
            Price::UploadedMinute(credits) => uploaded_seconds(job).saturating_mul(credits).div_ceil(60),
            Price::MusicMinute(credits) => {
                let body = job.object().unwrap_or_default();
                music::duration_ms(&body).saturating_mul(credits).div_ceil(60_000)
            }
        }
    }

    /// Executes the operation, with the identifiers `ids` of the path.
    pub(super) fn answer(&self, job: Job<'_>, ids: &[String]) -> Result<Answer, Refused> {
        if let Some(missing) = self.parts.iter().find(|part| !job.received.has_part(part)) {
            return Err(Shape::FieldMissing((*missing).into()).into());
        }
        let body = match self.yields {
            Yields::Music(_) | Yields::DetailedMusic => music::body_of(job, &["prompt", "composition_plan"])?,
            Yields::MusicPlan => music::body_of(job, &["prompt"])?,
            Yields::Voice(_)
            | Yields::Audio(_)
            | Yields::Alignment
            | Yields::Added(_)
            | Yields::List(_)
            | Yields::One(_)
            | Yields::Gone(_)
            | Yields::DubbedAudio => Map::new(),
        };
        let key = if self.price == Price::Free {
            reader(job, self.permission)?
        } else {
            job.payer(self.permission)?
        };
        let id = ids.first().map_or("", String::as_str);
        let cost = self.cost(job);
        let duration_ms = match self.price {
            Price::MusicMinute(_) => music::duration_ms(&body),
            Price::Free | Price::UploadedMinute(_) => {
                uploaded_seconds(job).saturating_mul(1_000).min(MAX_GENERATED_MS)
            }
        };
        let sound = |format| Sound::of(Melody::lasting(self.path, duration_ms), format);
        match self.yields {
            Yields::Voice(flow) => {
                let format = job.format(key)?;
                let voice_name = job.world.state().accounts.voice(key, id)?;
                let (admitted, slot) = job.world.admit(key, cost)?;
                let generated = GeneratedAudio {
                    voice_id: id.to_owned(),
                    voice_name,
                    model_id: "eleven_multilingual_sts_v2".to_owned(),
                    text: String::new(),
                    format,
                };
                let mut answer = job.generated(key, &admitted, generated, format.content_type());
                answer.body = flow.body(sound(format)).with_slot(slot);
                Ok(answer)
            }
            Yields::Audio(flow) => {
                let (_, slot) = job.world.admit(key, cost)?;
                let mut answer = charged(Answer::empty(&trace_id(), "audio/mpeg"), cost);
                answer.body = flow.body(sound(Format::DEFAULT)).with_slot(slot);
                Ok(answer)
            }
            Yields::Music(flow) => {
                let format = job.format(key)?;
                let (_, slot) = job.world.admit(key, cost)?;
                let mut answer = music::song(Answer::empty(&trace_id(), format.content_type()), cost);
                answer.body = flow.body(sound(format)).with_slot(slot);
                Ok(answer)
            }
            Yields::DetailedMusic => {
                let format = job.format(key)?;
                let (_, slot) = job.world.admit(key, cost)?;
                let kind = format!("multipart/mixed; boundary={}", music::BOUNDARY);
                let mut answer = music::song(Answer::empty(&trace_id(), &kind), cost);
                answer.body = music::detailed(&body, sound(format), format).with_slot(slot);
                Ok(answer)
            }
            Yields::MusicPlan => Ok(Answer::document(&music::plan_of(&body))),
            Yields::Alignment => {
                let text = job.received.part("text").unwrap_or_default();
                let (_, slot) = job.world.admit(key, cost)?;
                let mut answer = charged(Answer::document(&alignment(&text, duration_ms)), cost);
                answer.body = answer.body.with_slot(slot);
                Ok(answer)
            }
            Yields::Added(kind) => add(job, key, kind, cost),
            Yields::List(kind) => {
                let mut state = job.world.state();
                let workspace = state.accounts.workspace_mut(key).ok_or(Shape::InvalidKey)?;
                let resources = workspace.resources.documents(kind);
                Ok(Answer::document(&match kind {
                    Kind::Dubbing => json!({ "dubs": resources, "next_cursor": null, "has_more": false }),
                    Kind::Project => json!({ "projects": resources }),
                }))
            }
            Yields::One(kind) => find(job, key, kind, id, |resource| {
                resource.status_requests = resource.status_requests.saturating_add(1);
                Ok(Answer::document(&resource.document()))
            }),
            Yields::DubbedAudio => find(job, key, Kind::Dubbing, id, |dubbing| {
                let language = ids.get(1).map_or("", String::as_str);
                if dubbing.language != language {
                    return Err(Refused::with_subject(fixed_refusal("dubbing_language_not_found"), language));
                }
                if !dubbing.is_dubbed() {
                    return Err(fixed_refusal("dubbing_not_dubbed").into());
                }
                let mut answer = Answer::empty(&trace_id(), "audio/mpeg");
                let ms = dubbing.seconds.saturating_mul(1_000).min(MAX_GENERATED_MS);
                answer.body = whole(Sound::of(Melody::lasting(language, ms), Format::DEFAULT));
                Ok(answer)
            }),
            Yields::Gone(kind) => {
                let mut state = job.world.state();
                let workspace = state.accounts.workspace_mut(key).ok_or(Shape::InvalidKey)?;
                if workspace.resources.delete(kind, id) {
                    return Ok(Answer::document(&json!({ "status": "ok" })));
                }
                Err(not_found(kind, id))
            }
        }
    }
}

impl Flow {
    fn body(self, sound: Sound) -> AnswerBody {
        match self {
            Flow::Whole => whole(sound),
            Flow::Stream => streamed(sound),
        }
    }
}

/// The key of a reading request. It must have the permission; an unpaid bill does not matter.
fn reader(job: Job<'_>, permission: &'static str) -> Result<usize, Shape> {
    let key = require_key(job.presented)?;
    job.world.state().accounts.permit(key, permission)?;
    Ok(key)
}

fn not_found(kind: Kind, id: &str) -> Refused {
    Refused::with_subject(
        fixed_refusal(match kind {
            Kind::Dubbing => "dubbing_not_found",
            Kind::Project => "project_not_found",
        }),
        id,
    )
}

fn find(
    job: Job<'_>,
    key: usize,
    kind: Kind,
    id: &str,
    answer: impl FnOnce(&mut Resource) -> Result<Answer, Refused>,
) -> Result<Answer, Refused> {
    let mut state = job.world.state();
    let workspace = state.accounts.workspace_mut(key).ok_or(Shape::InvalidKey)?;
    answer(workspace.resources.find(kind, id).ok_or_else(|| not_found(kind, id))?)
}

fn add(job: Job<'_>, key: usize, kind: Kind, cost: u64) -> Result<Answer, Refused> {
    // A real dubbing takes longer than the request. Here the slot is released with the response.
    let (_, _slot) = job.world.admit(key, cost)?;
    let resource = Resource {
        kind,
        id: trace_id().get(12..).unwrap_or_default().to_owned(),
        name: job.received.part("name").unwrap_or_else(|| "Untitled".to_owned()),
        language: job.received.part("target_lang").unwrap_or_default(),
        seconds: uploaded_seconds(job),
        created_unix: clock::now().0 / 1_000,
        status_requests: 0,
    };
    let document = match kind {
        Kind::Dubbing => json!({ "dubbing_id": resource.id, "expected_duration_sec": resource.seconds }),
        Kind::Project => json!({ "project": resource.document() }),
    };
    let mut state = job.world.state();
    state.accounts.workspace_mut(key).ok_or(Shape::InvalidKey)?.resources.add(resource);
    let mut answer = Answer::document(&document);
    answer.charged = cost;
    Ok(answer)
}

fn uploaded_seconds(job: Job<'_>) -> u64 {
    job.received.bytes.div_ceil(UPLOAD_BYTES_PER_SECOND).max(1)
}

fn charged(mut answer: Answer, cost: u64) -> Answer {
    set(&mut answer.headers, "character-cost", &cost.to_string());
    answer.charged = cost;
    answer
}

/// `ForcedAlignmentResponseModel` of the OpenAPI document: all characters have the same length.
fn alignment(text: &str, duration_ms: u64) -> Value {
    let characters: Vec<char> = text.chars().collect();
    let total = u64::try_from(characters.len()).unwrap_or(u64::MAX).max(1);
    let time = |index: u64| seconds(duration_ms.saturating_mul(index) / total);
    let timed = (0..).zip(&characters).map(|(index, character)| {
        json!({ "text": character.to_string(), "start": time(index), "end": time(index + 1) })
    });
    let mut words = Vec::new();
    let mut index = 0;
    for word in text.split(' ') {
        let end = index + u64::try_from(word.chars().count()).unwrap_or(0);
        words.push(json!({ "text": word, "start": time(index), "end": time(end), "loss": 0.1 }));
        index = end + 1;
    }
    json!({ "characters": timed.collect::<Vec<_>>(), "words": words, "loss": 0.1 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_methods_and_identifiers_are_distinguished() {
        let find = |method: Method, path: &str| {
            let segments: Vec<&str> = path.split('/').collect();
            Operation::find(&method, &segments).map(|(operation, ids)| (operation.yields, ids))
        };
        let ids = |ids: &[&str]| ids.iter().map(|id| (*id).to_owned()).collect::<Vec<_>>();
        assert_eq!(find(Method::GET, "v1/dubbing"), Ok((Yields::List(Kind::Dubbing), ids(&[]))));
        assert_eq!(find(Method::DELETE, "v1/dubbing/d"), Ok((Yields::Gone(Kind::Dubbing), ids(&["d"]))));
        assert_eq!(find(Method::GET, "v1/dubbing/d/audio/de"), Ok((Yields::DubbedAudio, ids(&["d", "de"]))));
        assert_eq!(find(Method::PUT, "v1/dubbing/d"), Err(Shape::MethodNotAllowed("GET")));
        assert_eq!(find(Method::GET, "v1/music"), Err(Shape::MethodNotAllowed("POST")));
        for path in ["v1/dubbing/d/audio", "v1/musics", "v1", ""] {
            assert_eq!(find(Method::GET, path), Err(Shape::NotFound), "{path}");
        }
    }

    #[test]
    fn an_alignment_covers_the_text() {
        let document = alignment("ab c", 1_000);
        assert_eq!(document["characters"].as_array().unwrap().len(), 4);
        assert_eq!(document["words"][1], json!({ "text": "c", "start": 0.75, "end": 1.0, "loss": 0.1 }));
        assert_eq!(alignment("", 1_000)["characters"], json!([]));
    }
}
