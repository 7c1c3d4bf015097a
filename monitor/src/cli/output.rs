//! Where a command's output goes and how: JSON or text, colour, the terminal's width, and pipes that close.

use std::io::{self, IsTerminal as _};
use std::path::PathBuf;

use clap::ValueEnum;
use jobwarden::client::Client;
use jobwarden::config;
use jobwarden::model::outside::escape_json;
use jobwarden::render::Style;
use serde::Serialize;

use super::{Failure, Global};

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Color {
    Auto,
    Always,
    Never,
}

/// The global options, applied.
#[derive(Debug)]
pub(crate) struct Context {
    pub(crate) json: bool,
    socket: Option<PathBuf>,
    color: Color,
}

impl Context {
    pub(super) fn new(g: Global) -> Self {
        Self { json: g.json, socket: g.socket, color: g.color }
    }

    /// Flag or environment; None if neither says.
    pub(crate) fn given_socket(&self) -> Option<PathBuf> {
        self.socket.clone()
    }

    /// Flag over environment over the config file, where that can be read and is valid, over the default.
    pub(crate) fn socket(&self) -> PathBuf {
        self.socket.clone().unwrap_or_else(|| {
            config::load(None, &config::environment(), &config::Overrides::default())
                .map_or_else(|_| config::DEFAULT_SOCKET.into(), |c| c.agent.socket)
        })
    }

    pub(crate) fn client(&self) -> Result<Client, Failure> {
        Client::new(&self.socket()).map_err(|e| Failure::failed("failed", format!("the tokio runtime: {e}")))
    }

    pub(crate) fn style(&self) -> Style {
        let out = io::stdout();
        let terminal = out.is_terminal();
        // https://no-color.org: set and not empty.
        let plain = std::env::var_os("NO_COLOR").is_some_and(|v| !v.is_empty());
        let color = match self.color {
            Color::Always => true,
            Color::Never => false,
            Color::Auto => terminal && !plain && std::env::var_os("TERM").is_none_or(|t| t != "dumb"),
        };
        let size = rustix::termios::tcgetwinsize(&out).ok().filter(|_| terminal);
        Style { color, width: size.map(|s| usize::from(s.ws_col)).filter(|w| *w > 0) }
    }

    /// The value as JSON, or its text.
    pub(crate) fn show<T: Serialize>(
        &self,
        value: &T,
        text: impl FnOnce(Style) -> String,
    ) -> Result<(), Failure> {
        if !self.json {
            return print(&text(self.style()));
        }
        let json = serde_json::to_string(value).map_err(|e| Failure::failed("failed", e.to_string()))?;
        print_json(json)
    }
}

/// A line of JSON that is safe on a terminal.
pub(crate) fn print_json(mut json: String) -> Result<(), Failure> {
    json.push('\n');
    print(&escape_json(&json))
}

/// To stdout, at once. A reader that has closed the pipe has seen enough: that ends the program quietly.
pub(crate) fn print(text: &str) -> Result<(), Failure> {
    match jobwarden::output::print(text) {
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => std::process::exit(0),
        Err(e) => Err(Failure::failed("failed", format!("cannot write to stdout: {e}"))),
        Ok(()) => Ok(()),
    }
}
