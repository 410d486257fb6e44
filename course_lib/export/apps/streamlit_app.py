"""Chat with a fine-tuned model in Streamlit: streamlit run app.py. Made by `course publish`."""

import streamlit as st
from model import SETTINGS, answer, load

st.set_page_config(page_title=SETTINGS["title"])
st.title(SETTINGS["title"])
model, tokenizer = st.cache_resource(load)()
system = st.sidebar.text_area("System prompt")
temperature = st.sidebar.slider("Temperature", 0.0, 1.5, 0.0)
length = st.sidebar.slider("Tokens at most", 16, 1024, 256)
if st.sidebar.button("Start anew") or "messages" not in st.session_state:
    st.session_state.messages = []
for message in st.session_state.messages:
    st.chat_message(message["role"]).write(message["content"])
if question := st.chat_input("Your message"):
    st.chat_message("user").write(question)
    st.session_state.messages.append({"role": "user", "content": question})
    history = [{"role": "system", "content": system}] if system else []
    history += st.session_state.messages
    pieces = answer(model, tokenizer, history, temperature=temperature, max_new_tokens=length)
    text = st.chat_message("assistant").write_stream(pieces)
    st.session_state.messages.append({"role": "assistant", "content": text})
