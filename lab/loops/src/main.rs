//! t
fn main() -> anyhow::Result<()> {
    let n: u8 = std::env::args().nth(1).and_then(|s| s.parse().ok()).unwrap_or(1);
    println!("{:?}", suspend_loop::environment::Environment::detect());
    println!("{:?}", suspend_loop::environment::trial(n, std::time::Duration::from_secs(5))?);
    Ok(())
}
