//! What a page says beyond the plugin's own words: formulas in LaTeX, and recipes for plugins with keys that have no
//! default.

/// The name of a kind in the table of contents.
pub fn title(kind: &str) -> &'static str {
    match kind {
        "backbone" => "Backbones",
        "pos_encoding" => "Position encodings",
        "loss" => "Losses",
        "scheduler" => "Schedulers",
        "teacher" => "Teacher policies",
        "dataset" => "Datasets",
        "augmentation" => "Augmentations",
        "masking" => "Masking",
        "probe" => "Probes",
        "optimizer" => "Optimizers",
        other => panic!("a kind of plugin without a title: {other}"),
    }
}

/// The name of one of a kind.
pub fn singular(kind: &str) -> String {
    match kind {
        "teacher" => "Teacher policy".into(),
        "pos_encoding" => "Position encoding".into(),
        other => other[..1].to_uppercase() + &other[1..],
    }
}

/// The formula of a plugin.
pub fn formula(kind: &str, name: &str) -> Option<&'static str> {
    Some(match (kind, name) {
        ("loss", "dino") => {
            r"\mathcal{L} = \frac{n_g \mathcal{L}_g + w_l\, n_l \mathcal{L}_l}{n_g + n_l}, \qquad
              \mathcal{L}_{g,l} = -\operatorname*{mean}_{s,\,t} \sum_{k=1}^{K} q_{tk} \log p_{sk}, \qquad
              p_s = \operatorname{softmax}(z_s / \tau)"
        }
        ("loss", "ibot") => {
            r"\mathcal{L} = -\frac{1}{C} \sum_{c=1}^{C} \frac{1}{n_c} \sum_{i \in c} \sum_{k=1}^{K} q_{ik} \log p_{ik}"
        }
        ("loss", "koleo") => {
            r"\mathcal{L} = -\sum_{c=1}^{G} \frac{1}{B} \sum_{i=1}^{B}
              \log \left( \left\lVert x_i - x_{\mathrm{nn}(i)} + \epsilon \right\rVert + \epsilon \right)"
        }
        ("loss", "gram") => r"\mathcal{L} = \frac{1}{P^2} \left\lVert X_S X_S^\top - X_G X_G^\top \right\rVert_F^2",
        ("loss", "byol") => {
            r"\mathcal{L} = \sum_{c} \frac{1}{B} \sum_{i=1}^{B} \left\lVert \frac{q(z_{ci})}{\lVert q(z_{ci}) \rVert}
              - \frac{t_{di}}{\lVert t_{di} \rVert} \right\rVert^2, \qquad d \neq c"
        }
        ("loss", "vicreg") => {
            r"\mathcal{L} = \frac{\lambda}{B D} \lVert Z - Z' \rVert_F^2
              + \frac{\mu}{2 D} \sum_{j} \left[ \max(0, 1 - \sqrt{C_{jj} + \epsilon}) + \max(0, 1 - \sqrt{C'_{jj} + \epsilon}) \right]
              + \frac{\nu}{D} \sum_{i \neq j} \left[ C_{ij}^2 + C_{ij}'^2 \right]"
        }
        ("loss", "barlow_twins") => r"\mathcal{L} = \sum_{i} (1 - C_{ii})^2 + \lambda \sum_{i \neq j} C_{ij}^2",
        ("loss", "rotation") => {
            r"\mathcal{L} = -\frac{1}{B Y} \sum_{i} \sum_{y} \log \operatorname{softmax}\left( W f(R_y x_i) + b \right)_y"
        }
        ("loss", "jigsaw") => {
            r"\mathcal{L} = -\frac{1}{B} \sum_{i} \log \operatorname{softmax}\left( g\left[ f(x_{i,\pi(1)}), \ldots, f(x_{i,\pi(9)}) \right] \right)_{\pi}"
        }
        ("loss", "relative_location") => {
            r"\mathcal{L} = -\frac{1}{B N} \sum_{i} \sum_{n} \log \operatorname{softmax}\left( g\left[ f(x_{i,0}), f(x_{i,n}) \right] \right)_{n}"
        }
        ("loss", "cka") => {
            r"\mathcal{L} = \frac{1}{2B} \sum_{i,c} \left[ 1 - \frac{\langle H K H, H L H \rangle}
              {\lVert H K H \rVert_F \lVert H L H \rVert_F} \right], \qquad K = X_S X_S^\top, \quad L = X_T X_T^\top"
        }
        ("loss", "feature_distillation") => {
            r"\mathcal{L} = \alpha \frac{1}{N} \sum_{i} \left[ 1 - \cos(A s_i + a,\, t_i) \right]
              + \beta \frac{1}{N P} \sum_{i,p} \left[ 1 - \cos(B s_{ip} + b,\, t_{ip}) \right]"
        }
        ("loss", "inpainting") => {
            r"\mathcal{L} = \frac{1}{3 p^2 M} \sum_{i=1}^{M} \left\lVert W h_i + b - x_i \right\rVert_1"
        }
        ("loss", "sigreg") => {
            r"\mathcal{L} = (1 - \lambda) \frac{1}{V B D} \sum_{v,i} \lVert z_{vi} - m_i \rVert^2
              + \frac{\lambda}{V A} \sum_{v,a} B \int_{-5}^{5} \left\lvert f_{va}(t) - e^{-t^2 / 2} \right\rvert^2 e^{-t^2 / 2} \, dt"
        }
        ("loss", "info_nce") => {
            r"\mathcal{L} = -\frac{1}{2B} \sum_{i} \log \frac{\exp(z_i \cdot z_{p(i)} / \tau)}{\sum_{k \neq i} \exp(z_i \cdot z_k / \tau)}"
        }
        ("pos_encoding", "rope_box") => {
            r"\theta_{p,a,j} = \frac{2 \pi\, c_{p,a}}{\lambda_j}, \qquad
              \lambda_j = b^{\,2j / (D/2)}, \qquad
              x \mapsto x \cos\theta + \operatorname{rotate\_half}(x) \sin\theta"
        }
        ("scheduler", "linear_warmup") => r"v(i) = v_0 + (v_p - v_0)\, \min\left(1, \frac{i}{w}\right)",
        ("optimizer", "adamw") => {
            r"m_t = \beta_1 m_{t-1} + (1 - \beta_1)\, g_t, \qquad v_t = \beta_2 v_{t-1} + (1 - \beta_2)\, g_t^2, \qquad
              d_t = \frac{m_t / (1 - \beta_1^t)}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon}"
        }
        ("optimizer", "sgd") => r"m_t = \mu\, m_{t-1} + g_t, \qquad d_t = m_t",
        ("optimizer", "muon") => {
            r"M_t = \mu M_{t-1} + (1 - \mu)\, G_t, \qquad U \Sigma V^\top = \mu M_t + (1 - \mu)\, G_t, \qquad
              D_t \approx 0.2 \sqrt{\max(r, c)}\; U V^\top"
        }
        ("masking", "multi_block") => r"n = \left\lfloor P \left( 1 - (1 - s)^b \right) \right\rfloor",
        ("teacher", "ema") => r"\theta_T \leftarrow m\, \theta_T + (1 - m)\, \theta_S",
        _ => return None,
    })
}

/// A recipe that chooses a plugin, where the plugin has keys without a default or one would choose it in another way.
pub fn example(kind: &str, name: &str) -> Option<&'static str> {
    Some(match (kind, name) {
        ("backbone", "vit") => "[backbone]\nplugin = \"vit\"\npreset = \"vit_s16\"",
        ("pos_encoding", "rope_box") => {
            "[backbone.pos_encoding]\nplugin = \"rope_box\"\njitter = 1.1\nrescale = 2.0"
        }
        ("loss", "koleo") => "[losses.koleo]\nweight = 0.1",
        ("loss", "online_linear") => "[losses.online_linear]\nclasses = 4",
        ("loss", "gram") => "[losses.gram]\nenabled = true\nweight = 2.0",
        ("teacher", "none") => {
            "[teacher]\nplugin = \"none\"\n\n[losses]\ndino = { enabled = false }\nibot = { enabled = false }\nsigreg = {}"
        }
        ("scheduler", "constant") => "[optimizer]\nlr = { plugin = \"constant\", value = 1e-3 }\nweight_decay = 0.04",
        ("scheduler", "linear_warmup") => {
            "[optimizer]\nlr = { plugin = \"linear_warmup\", peak = 1e-3, warmup_steps = 40 }"
        }
        ("scheduler", "linear_warmup_cosine") => {
            "[optimizer]\nlr = { plugin = \"linear_warmup_cosine\", peak = 1e-3, end = 1e-5, warmup_steps = 40 }"
        }
        ("scheduler", "cosine") => "[teacher]\nmomentum = { plugin = \"cosine\", peak = 0.992, end = 1.0 }",
        ("scheduler", "step") => "[optimizer]\nlr = { plugin = \"step\", value = 1e-3, milestones = [150, 225] }",
        ("teacher", "ema") => "[teacher]\nplugin = \"ema\"\nmomentum = 0.99",
        ("teacher", "frozen") => "[teacher]\nplugin = \"frozen\"\ncheckpoint = \"runs/earlier\"",
        ("teacher", "gram_anchor") => {
            "[losses.gram]\nenabled = true\n\n[teachers.gram]\nplugin = \"gram_anchor\"\nfirst_step = 150\nrefresh = { every = 50 }\ncrop_size = 96"
        }
        ("augmentation", "multi_crop") => "[crops]\nglobal_size = 64\nlocal_size = 32\nsolarize = [0.0, 0.0, 0.0]",
        ("masking", "block") => "[masking]\nprobability = 0.5\nratio = [0.1, 0.5]",
        ("masking", "random") => "[masking]\nplugin = \"random\"\nprobability = 1.0\nratio = [0.75, 0.75]",
        ("dataset", "scenes") => "[data]\nplugin = \"scenes\"\ncount = 2048\nclasses = 4",
        ("dataset", "manifest") => {
            "extends = \"tiny_photos.toml\"\n\n[data]\nplugin = \"manifest\"\npath = \"/path/to/images.csv\""
        }
        ("dataset", "cut_outs") => {
            "[data]\nplugin = \"cut_outs\"\npath = \"/path/to/cut_outs\"\nbackgrounds = \"/path/to/photographs\""
        }
        ("dataset", "webdataset") => {
            "extends = \"tiny_photos.toml\"\n\n[data]\nplugin = \"webdataset\"\npath = \"/path/to/train-{000000..000146}.tar\"\nval = \"/path/to/val-{000000..000006}.tar\""
        }
        ("dataset", "parquet") => {
            "extends = \"tiny_photos.toml\"\n\n[data]\nplugin = \"parquet\"\npath = \"/path/to/data\""
        }
        ("dataset", "image_folder") => {
            "extends = \"tiny_photos.toml\"\n\n[data]\nplugin = \"image_folder\"\npath = \"/path/to/images\""
        }
        _ => return None,
    })
}
