//! The options of a benchmark run. xtask includes this file as well: it shows them in its help and passes them on.

#[derive(clap::Args)]
pub(crate) struct Options {
    /// A small part of everything and the dev profile: shows that each row yields a figure, not what it is
    #[arg(long)]
    pub(crate) short: bool,
    /// Fail if a row yields no figure, or a peer neither figure nor reason; never because of what a figure is
    #[arg(long)]
    pub(crate) check: bool,
    /// Print JSON too
    #[arg(long)]
    pub(crate) json: bool,
    /// Only these groups of rows (probes, spawn, flood, ..); writes no page
    #[arg(long, value_delimiter = ',')]
    pub(crate) only: Vec<String>,
}
