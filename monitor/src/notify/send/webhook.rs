//! A webhook: the contract's JSON, signed if a secret is given.

use std::path::PathBuf;

use hmac::{Hmac, Mac as _};
use hyper::Uri;
use hyper::header::{HeaderMap, HeaderValue};
use serde::Serialize;
use sha2::Sha256;

use super::DeliveryResult;
use super::http::{Client, TargetError, read_secret};
use crate::model::schema::Alert;

/// `sha256=` and the HMAC-SHA256 of the body under the secret, in hex.
const SIGNATURE: &str = "x-jobwarden-signature";

#[derive(Debug)]
pub(in crate::notify) struct Webhook {
    client: Client,
    url: Uri,
    secret_file: Option<PathBuf>,
}

/// The contract's webhook body.
#[derive(Serialize)]
pub(super) struct Body<'a> {
    version: u32,
    alerts: &'a [Alert],
}

impl<'a> Body<'a> {
    pub(super) const fn of(alerts: &'a [Alert]) -> Self {
        Self { version: 1, alerts }
    }
}

impl Webhook {
    pub(super) fn new(client: Client, url: &str, secret_file: Option<PathBuf>) -> Result<Self, TargetError> {
        let url = client.url(url)?;
        if let Some(path) = &secret_file {
            client.check_secret(path)?;
        }
        Ok(Self { client, url, secret_file })
    }

    pub(super) async fn post(&self, alerts: &[Alert]) -> DeliveryResult {
        let Ok(body) = serde_json::to_vec(&Body::of(alerts)) else {
            return DeliveryResult::Refused { error: "the alert cannot be written as JSON".into() };
        };
        let mut headers = HeaderMap::new();
        if let Some(path) = &self.secret_file {
            let secret = match read_secret(path) {
                Ok(secret) => secret,
                Err(fate) => return fate,
            };
            if let Some(v) = signature(secret.as_bytes(), &body).and_then(|s| HeaderValue::from_str(&s).ok())
            {
                headers.insert(SIGNATURE, v);
            }
        }
        self.client.post(&self.url, body, headers).await
    }
}

/// None never comes: HMAC takes a key of any length.
fn signature(secret: &[u8], body: &[u8]) -> Option<String> {
    use std::fmt::Write as _;
    let mut mac = Hmac::<Sha256>::new_from_slice(secret).ok()?;
    mac.update(body);
    let mut out = String::from("sha256=");
    for b in mac.finalize().into_bytes() {
        // Writing to a String cannot fail.
        let _ = write!(out, "{b:02x}");
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_signature_is_that_of_rfc_4231() {
        let said = super::signature(b"Jefe", b"what do ya want for nothing?").unwrap();
        assert_eq!(said, "sha256=5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843");
    }
}
